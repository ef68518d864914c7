//! Interrupt controllers and clock of a machine, which KVM keeps.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// What KVM keeps of a machine beside its CPUs.
#[derive(Default, Serialize, Deserialize)]
pub struct Chips {
    controllers: Vec<kvm_irqchip>,
    /// Nanoseconds that the guest's clock has run.
    pub clock_ns: u64,
}

impl Chips {
    /// Read the controllers of `vm`, whose CPUs are paused since its clock stood at `clock_ns`.
    pub fn save(vm: &VmFd, clock_ns: u64) -> Result<Self, kvm_ioctls::Error> {
        let mut controllers = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip)?;
            controllers.push(chip);
        }
        Ok(Self { controllers, clock_ns })
    }

    /// Set the controllers of `vm`. The clock is set when the CPUs go on: [`set_clock`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.controllers.iter().try_for_each(|chip| vm.set_irqchip(chip))
    }
}

/// Nanoseconds that the guest's clock has run.
pub fn clock_ns(vm: &VmFd) -> Result<u64, kvm_ioctls::Error> {
    Ok(vm.get_clock()?.clock)
}

/// Let the guest's clock go on from here: what it did not see of the host's time, it did not miss.
pub fn set_clock(vm: &VmFd, clock_ns: u64) -> Result<(), kvm_ioctls::Error> {
    vm.set_clock(&kvm_clock_data { clock: clock_ns, ..Default::default() })
}
