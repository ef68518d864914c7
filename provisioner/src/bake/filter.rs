//! What a baked step is left with: the capabilities that installing packages takes, and no system call that makes
//! namespaces or mounts, looks into other processes, or reaches parts of the kernel that no package's script needs.

use std::{collections::BTreeMap, io};

use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Owners and modes of files, users to run as: what dpkg, apt and their scripts do.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_CHROOT);

/// System calls that fail with EPERM.
const REFUSED: &[libc::c_long] = &[
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_open_by_handle_at,
];

/// Kinds of sockets that there are: of the machine itself, IPv4 and IPv6 (the cache, on the loopback), and netlink.
const SOCKETS: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Flags of clone(2) that make namespaces.
const NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

fn refuse(calls: &[libc::c_long], rules: impl Fn() -> Vec<SeccompRule>) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, rules())).collect()
}

fn program(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: libc::c_int) -> io::Result<BpfProgram> {
    let action = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, action, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(io::Error::other)
}

/// Takes everything else from this process and all that it becomes.
pub fn apply() -> io::Result<()> {
    for capability in CapabilitySet::all().difference(CAPABILITIES).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let condition =
        |index, length, op, value| SeccompCondition::new(index, length, op, value).map_err(io::Error::other);
    let mut refused = refuse(REFUSED, Vec::new);
    let mut other_sockets = Vec::new();
    for kind in SOCKETS {
        other_sockets.push(condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, kind as u64)?);
    }
    refused.insert(libc::SYS_socket, vec![SeccompRule::new(other_sockets).map_err(io::Error::other)?]);
    let mut namespaces = Vec::new();
    for bit in (0..64).map(|bit| 1u64 << bit).filter(|bit| NAMESPACES & bit != 0) {
        let set = condition(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bit), bit)?;
        namespaces.push(SeccompRule::new(vec![set]).map_err(io::Error::other)?);
    }
    refused.insert(libc::SYS_clone, namespaces);
    // Its flags lie in memory, where no filter sees them: programs fall back to clone(2).
    let unknown = refuse(&[libc::SYS_clone3], Vec::new);
    for program in [program(refused, libc::EPERM)?, program(unknown, libc::ENOSYS)?] {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}
