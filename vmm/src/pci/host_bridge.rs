//! Device 0: the host bridge, there because Linux looks for one before it trusts a bus.

use super::{Function, FunctionState, config_space::ConfigSpace};

/// Red Hat's "QEMU PCIe Host bridge", which needs no driver.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0008;
const CLASS_HOST_BRIDGE: u32 = 0x06_0000;

/// The host bridge.
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self(ConfigSpace::new(VENDOR, DEVICE, CLASS_HOST_BRIDGE, 0))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Function for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar_size(&self) -> u64 {
        0
    }
    fn bar(&self) -> Option<u64> {
        None
    }
    fn read_bar(&mut self, _: u64, _: &mut [u8]) {}
    fn write_bar(&mut self, _: u64, _: &[u8]) {}
    fn pause(&mut self) {}
    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn stop(&mut self) {}
    fn save(&mut self) -> Result<FunctionState, String> {
        Ok(FunctionState::Plain { space: self.0.bytes().to_vec() })
    }
    fn restore(&mut self, state: &FunctionState) -> Result<(), String> {
        match state {
            FunctionState::Plain { space } => self.0.write(0, space.get(..256).unwrap_or(space)),
            FunctionState::Virtio(_) => {
                return Err("it has a virtio device in the place of the host bridge".into());
            }
        }
        Ok(())
    }
}
