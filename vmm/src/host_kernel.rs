//! What lab-vmm asks of the host's kernel: Linux 5.10 or later, with all of KVM that it uses. Looked at once, so that what
//! is missing is told in one sentence, and not by whichever call fails first.

use kvm_ioctls::{Cap, Kvm};

/// The oldest Linux that is known to have all that is used: major, minor.
pub const OLDEST: (u32, u32) = (5, 10);
/// Asynchronous page faults are told by an interrupt from here on without a guest spinning.
const ASYNC_PAGE_FAULTS: (u32, u32) = (5, 13);

/// What KVM has to have.
const NEEDED: [(Cap, &str); 13] = [
    (Cap::Irqchip, "interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
    (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::AdjustClock, "a clock that can be set (KVM_CAP_ADJUST_CLOCK)"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
];

/// What is missing of KVM, in one sentence.
pub fn missing(kvm: &Kvm) -> Option<String> {
    sentence(|cap| kvm.check_extension(cap), &release())
}

fn sentence(has: impl Fn(Cap) -> bool, release: &str) -> Option<String> {
    let missing: Vec<&str> = NEEDED.iter().filter(|(cap, _)| !has(*cap)).map(|(_, name)| *name).collect();
    let (major, minor) = OLDEST;
    (!missing.is_empty()).then(|| {
        format!(
            "this host's KVM lacks {}: lab needs Linux {major}.{minor} or later, and this is {release}",
            missing.join(", ")
        )
    })
}

/// Whether guests may be told of asynchronous page faults.
pub fn async_page_faults() -> bool {
    version(&release()).is_none_or(|version| version >= ASYNC_PAGE_FAULTS)
}

/// The running kernel, as `uname -r` tells it.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Major and minor version of a release, `6.12.48+deb13-amd64`; `None` where it has none.
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    numbers.next().flatten().zip(numbers.next().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_old_kernel_lacks_is_told_in_one_sentence() {
        assert_eq!(sentence(|_| true, "4.4.0"), None);
        let told =
            sentence(|cap| !matches!(cap, Cap::ImmediateExit | Cap::Ioeventfd), "4.9.0-19-amd64").unwrap();
        assert_eq!(
            told,
            "this host's KVM lacks ioeventfd (KVM_CAP_IOEVENTFD), immediate exits (KVM_CAP_IMMEDIATE_EXIT): lab needs Linux \
             5.10 or later, and this is 4.9.0-19-amd64"
        );
        // Here, all is there.
        if let Ok(kvm) = Kvm::new() {
            assert_eq!(missing(&kvm), None);
        }
    }

    #[test]
    fn versions_are_numbers() {
        for (release, expected) in [
            ("6.12.48+deb13-cloud-amd64", Some((6, 12))),
            ("5.9.0", Some((5, 9))),
            ("5.15-rc1", Some((5, 15))),
            ("linux", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
        assert!(version("5.9.0") < Some(OLDEST) && version("5.10.0-1") >= Some(OLDEST));
    }
}
