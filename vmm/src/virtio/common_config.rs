//! The common configuration structure of virtio-pci (virtio 1.3 §4.1.4.3): feature negotiation, device status and the
//! setting up of queues. Accesses may have any offset and width.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::pci::msix::NO_VECTOR;

/// Length of the structure in bytes.
pub const LENGTH: usize = 0x40;

/// Device status bits (virtio 1.3 §2.1).
pub mod status {
    /// The guest has a driver that suits the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
    /// Bits that a driver sets.
    pub const BY_DRIVER: u8 = 1 | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX.
pub const RING_EVENT_IDX: u64 = 1 << 29;

/// A field of the structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    QueueDescriptors,
    QueueDriver,
    QueueDevice,
}

/// Offset and length of every field, by offset; what lies behind reads as zero.
const FIELDS: [(Field, usize, usize); 16] = [
    (Field::DeviceFeatureSelect, 0x00, 4),
    (Field::DeviceFeature, 0x04, 4),
    (Field::DriverFeatureSelect, 0x08, 4),
    (Field::DriverFeature, 0x0c, 4),
    (Field::ConfigVector, 0x10, 2),
    (Field::NumQueues, 0x12, 2),
    (Field::Status, 0x14, 1),
    (Field::Generation, 0x15, 1),
    (Field::QueueSelect, 0x16, 2),
    (Field::QueueSize, 0x18, 2),
    (Field::QueueVector, 0x1a, 2),
    (Field::QueueEnable, 0x1c, 2),
    (Field::QueueNotifyOffset, 0x1e, 2),
    (Field::QueueDescriptors, 0x20, 8),
    (Field::QueueDriver, 0x28, 8),
    (Field::QueueDevice, 0x30, 8),
];

/// What the driver has said of a queue.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct QueueConfig {
    /// Largest size.
    pub max_size: u16,
    /// Chosen size.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// MSI-X vector.
    pub vector: u16,
    /// Guest physical addresses of descriptor table, driver (available) ring and device (used) ring.
    pub rings: [u64; 3],
}

impl QueueConfig {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, vector: NO_VECTOR, rings: [0; 3] }
    }

    /// The queue as the device gets it; `None` if the driver has said what no driver may say.
    pub fn build(&self, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        if self.enabled {
            let [descriptors, driver, device] = self.rings.map(GuestAddress);
            queue.try_set_size(self.size).ok()?;
            queue.try_set_desc_table_address(descriptors).ok()?;
            queue.try_set_avail_ring_address(driver).ok()?;
            queue.try_set_used_ring_address(device).ok()?;
            queue.set_event_idx(features & RING_EVENT_IDX != 0);
            queue.set_ready(true);
        }
        Some(queue)
    }
}

/// What a write asks the transport to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Stop the device and forget everything.
    Reset,
    /// Start the device.
    Activate,
    /// Use this vector for configuration changes.
    ConfigVector(u16),
    /// Use this vector (second) for this queue (first).
    QueueVector(u16, u16),
}

/// The structure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CommonConfig {
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    /// Status bits that the driver has set; NEEDS_RESET is the transport's.
    pub status: u8,
    /// The queues.
    pub queues: Vec<QueueConfig>,
}

impl CommonConfig {
    /// As after a reset: `offered` features, queues of these sizes, `vectors` MSI-X vectors.
    pub fn new(offered: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            status: 0,
            queues: queue_sizes.iter().map(|size| QueueConfig::new(*size)).collect(),
        }
    }

    /// Forget everything that the driver has said.
    pub fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// Whether `other` belongs to a device of the same kind: the same features, queues and vectors.
    pub fn is_like(&self, other: &Self) -> bool {
        let sizes = |config: &Self| config.queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        (self.offered, self.vectors, sizes(self)) == (other.offered, other.vectors, sizes(other))
    }

    /// MSI-X vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The features that were negotiated.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    fn selected(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn get(&self, field: Field, generation: u8, device_status: u8) -> u64 {
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let ring = |index: usize| self.selected().map_or(0, |queue| queue.rings[index]);
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select.into(),
            Field::DeviceFeature => half(self.offered, self.device_feature_select),
            Field::DriverFeatureSelect => self.driver_feature_select.into(),
            Field::DriverFeature => half(self.driver_features, self.driver_feature_select),
            Field::ConfigVector => self.config_vector.into(),
            Field::NumQueues => self.queues.len() as u64,
            Field::Status => u64::from(self.status | device_status),
            Field::Generation => generation.into(),
            Field::QueueSelect => self.queue_select.into(),
            // Size 0: there is no such queue.
            Field::QueueSize => self.selected().map_or(0, |queue| queue.size.into()),
            Field::QueueVector => self.selected().map_or(NO_VECTOR, |queue| queue.vector).into(),
            Field::QueueEnable => self.selected().map_or(0, |queue| queue.enabled.into()),
            Field::QueueNotifyOffset => self.selected().map_or(0, |_| self.queue_select.into()),
            Field::QueueDescriptors => ring(0),
            Field::QueueDriver => ring(1),
            Field::QueueDevice => ring(2),
        }
    }

    fn image(&self, generation: u8, device_status: u8) -> [u8; LENGTH] {
        let mut image = [0; LENGTH];
        for (field, offset, length) in FIELDS {
            let value = self.get(field, generation, device_status).to_le_bytes();
            image[offset..offset + length].copy_from_slice(&value[..length]);
        }
        image
    }

    /// Read at `offset`. `device_status` holds the status bits that the device has set.
    pub fn read(&self, offset: u64, data: &mut [u8], generation: u8, device_status: u8) {
        let image = self.image(generation, device_status);
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Write at `offset`; what has to follow.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Effect> {
        let first = offset as usize;
        let end = first.saturating_add(data.len());
        let mut effects = Vec::new();
        for (field, at, length) in FIELDS {
            if at >= end || at + length <= first {
                continue;
            }
            // The part of the field that is not written keeps its value.
            let mut value = self.get(field, 0, 0).to_le_bytes();
            for (index, byte) in value.iter_mut().enumerate().take(length) {
                if let Some(new) = (at + index).checked_sub(first).and_then(|i| data.get(i)) {
                    *byte = *new;
                }
            }
            effects.extend(self.set(field, u64::from_le_bytes(value)));
        }
        effects
    }

    fn set(&mut self, field: Field, value: u64) -> Option<Effect> {
        let vector = if value < u64::from(self.vectors) { value as u16 } else { NO_VECTOR };
        let index = self.queue_select;
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Field::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Field::DriverFeature if self.status & status::FEATURES_OK == 0 => {
                let half = value & 0xffff_ffff;
                match self.driver_feature_select {
                    0 => self.driver_features = self.driver_features >> 32 << 32 | half,
                    1 => self.driver_features = self.driver_features & 0xffff_ffff | half << 32,
                    _ => {}
                }
            }
            Field::ConfigVector => {
                self.config_vector = vector;
                return Some(Effect::ConfigVector(vector));
            }
            Field::Status => return self.set_status(value as u8),
            Field::QueueSelect => self.queue_select = value as u16,
            Field::QueueVector => {
                self.queues.get_mut(usize::from(index))?.vector = vector;
                return Some(Effect::QueueVector(index, vector));
            }
            _ => self.set_queue(field, value),
        }
        None
    }

    /// A queue is set up once: after it is enabled, or the driver is ready, nothing of it changes before a reset.
    fn set_queue(&mut self, field: Field, value: u64) {
        if self.status & status::DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled {
            return;
        }
        match field {
            Field::QueueSize => queue.size = value as u16,
            Field::QueueEnable => queue.enabled = value == 1,
            Field::QueueDescriptors => queue.rings[0] = value,
            Field::QueueDriver => queue.rings[1] = value,
            Field::QueueDevice => queue.rings[2] = value,
            // The others are only read.
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Option<Effect> {
        if value == 0 {
            return Some(Effect::Reset);
        }
        let new = value & status::BY_DRIVER & !self.status;
        self.status |= new & !(status::FEATURES_OK | status::DRIVER_OK);
        if new & status::FEATURES_OK != 0
            && self.driver_features & !self.offered == 0
            && self.driver_features & VERSION_1 != 0
        {
            self.status |= status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0
            && self.status & (status::FEATURES_OK | status::FAILED) == status::FEATURES_OK
        {
            self.status |= status::DRIVER_OK;
            return Some(Effect::Activate);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = VERSION_1 | RING_EVENT_IDX | 1;

    fn get16(config: &CommonConfig, offset: u64) -> u16 {
        let mut data = [0; 2];
        config.read(offset, &mut data, 0, 0);
        u16::from_le_bytes(data)
    }

    fn negotiate(config: &mut CommonConfig, features: u64) {
        config.write(0x14, &[3]);
        config.write(0x08, &0u32.to_le_bytes());
        config.write(0x0c, &(features as u32).to_le_bytes());
        config.write(0x08, &1u32.to_le_bytes());
        config.write(0x0c, &((features >> 32) as u32).to_le_bytes());
        config.write(0x14, &[11]);
    }

    #[test]
    fn features_are_negotiated_once() {
        let mut config = CommonConfig::new(OFFERED, &[256], 2);
        negotiate(&mut config, OFFERED | 2);
        assert_eq!(config.status & status::FEATURES_OK, 0, "a feature that was not offered");
        negotiate(&mut config, 1);
        assert_eq!(config.status & status::FEATURES_OK, 0, "legacy drivers are not for us");
        negotiate(&mut config, VERSION_1 | 1);
        assert_ne!(config.status & status::FEATURES_OK, 0);
        negotiate(&mut config, OFFERED);
        assert_eq!(config.features(), VERSION_1 | 1, "too late to change one's mind");
        assert_eq!(config.write(0x14, &[15]), [Effect::Activate]);
        assert_eq!(config.write(0x14, &[15]), [], "only once");
        assert_eq!(config.write(0x14, &[0]), [Effect::Reset]);
    }

    #[test]
    fn an_enabled_queue_does_not_change() {
        let mut config = CommonConfig::new(OFFERED, &[256, 128], 2);
        config.write(0x16, &[1, 0]);
        config.write(0x18, &64u16.to_le_bytes());
        // 64-bit addresses in halves, and at once.
        config.write(0x20, &0x1000u32.to_le_bytes());
        config.write(0x24, &1u32.to_le_bytes());
        config.write(0x28, &0x2000u64.to_le_bytes());
        config.write(0x30, &0x3000u64.to_le_bytes());
        config.write(0x1c, &1u16.to_le_bytes());
        for value in [1u16, 0, 1] {
            config.write(0x1c, &value.to_le_bytes());
            config.write(0x18, &8u16.to_le_bytes());
            config.write(0x20, &0u64.to_le_bytes());
        }
        let queue = &config.queues[1];
        assert_eq!((queue.size, queue.rings), (64, [0x1_0000_1000, 0x2000, 0x3000]));
        assert!(queue.enabled);
        assert!(!config.queues[0].enabled);
        assert_eq!((get16(&config, 0x1e), get16(&config, 0x12)), (1, 2));
        config.write(0x16, &[9, 0]);
        assert_eq!(get16(&config, 0x18), 0, "no such queue");
        config.write(0x1c, &[1, 0]);
    }

    #[test]
    fn vectors_that_are_not_there_read_back_as_none() {
        let mut config = CommonConfig::new(OFFERED, &[256], 2);
        assert_eq!(config.write(0x10, &1u16.to_le_bytes()), [Effect::ConfigVector(1)]);
        assert_eq!(get16(&config, 0x10), 1);
        config.write(0x1a, &2u16.to_le_bytes());
        assert_eq!(get16(&config, 0x1a), NO_VECTOR);
    }

    #[test]
    fn absurd_queues_are_not_built() {
        for (size, rings) in
            [(0, [0; 3]), (3, [0; 3]), (512, [0; 3]), (8, [1, 0, 0]), (8, [0, 1, 0]), (8, [0, 0, 2])]
        {
            let queue = QueueConfig { max_size: 256, size, enabled: true, vector: 0, rings };
            assert!(queue.build(0).is_none(), "{queue:?}");
        }
    }
}
