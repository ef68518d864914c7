//! What KVM adds to the host's time stamp counter for a CPU (Documentation/virt/kvm/devices/vcpu.rst §4, Linux 5.16 and
//! later).

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

// kvm-ioctls has these calls for the CPUs of other architectures alone.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
        flags: 0,
    }
}

/// The offset of `cpu`; none if KVM does not tell.
pub fn get(cpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = attribute(&raw mut offset);
    // SAFETY: KVM writes 8 bytes to `offset`, which lives longer than the call.
    let result = unsafe { ioctl_with_ref(&cpu.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Set the offset of `cpu`; false if KVM cannot.
pub fn set(cpu: &VcpuFd, mut offset: u64) -> bool {
    let attribute = attribute(&raw mut offset);
    // SAFETY: KVM reads 8 bytes of `offset`, which lives longer than the call.
    unsafe { ioctl_with_ref(&cpu.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attribute) == 0 }
}
