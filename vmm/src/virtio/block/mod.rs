//! Block device (virtio 1.3 §5.2): a disk on a raw file or a qcow2 image. `image` moves the data, `request` reads
//! what the guest asks for.

mod image;
mod request;
#[cfg(test)]
mod tests;

use std::{fs, io, os::unix::fs::MetadataExt, sync::Arc};

use rustix::fs::{FlockOperation, flock};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Error, VirtioDevice, Working,
    counters::Counters,
    queue::{COMMON_FEATURES, DeviceQueue, Given, read_config},
    worker::{Fault, Handler, Poll, Worker, complain},
};
use crate::{config::DiskConfig, qcow2};
use image::Image;
use request::{Request, Transfer};

const QUEUE_SIZES: [u16; 1] = [256];

/// Size of a sector in bytes, whatever the disk's own block size (virtio 1.3 §5.2.2).
const SECTOR: u64 = 512;
/// Unit in bytes in which the host's disks are written.
const PHYSICAL: u64 = 4096;
/// Most data buffers in a request: the ring without header and status.
const SEGMENTS: u32 = 254;
/// Most sectors in one discard or write-zeroes: 1 GiB.
const MAX_ZEROES: u32 = (1 << 30) / SECTOR as u32;
/// Completions kept before the driver is told, while requests are quick.
const BATCH: usize = 16;
/// Data in bytes from which on a request is not quick.
const SLOW: usize = 64 << 10;

/// Index of each counter: requests, bytes read, bytes written.
const REQUESTS: usize = 0;
const READ: usize = 1;
const WRITTEN: usize = 2;

/// A disk.
pub struct Block {
    name: String,
    config: Vec<u8>,
    features: u64,
    counters: Arc<Counters<3>>,
    /// What the handler needs, while no thread has it.
    disk: Option<Disk>,
    worker: Option<Worker<BlockHandler>>,
}

impl Block {
    /// Opens and locks the image. `name` is what the guest finds as the disk's serial number (`/dev/disk/by-id`),
    /// at most 20 bytes of it.
    pub fn new(name: &str, config: &DiskConfig) -> Result<Self, Error> {
        let path = config.path.display();
        let image = Image::open(config)?;
        let sectors = image.size() / SECTOR;
        if sectors == 0 {
            return Err(Error::Device(format!("disk image {path} is smaller than a sector of 512 bytes")));
        }
        let mut features = COMMON_FEATURES
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        features |= if config.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        let counters = Arc::new(Counters::default());
        Ok(Self {
            name: name.to_owned(),
            config: configuration(sectors, config.sector_bytes, image.granularity()),
            features,
            counters: Arc::clone(&counters),
            disk: Some(Disk {
                device: format!("disk {path}"),
                serial: name.to_owned(),
                sectors,
                source: config.clone(),
                image,
                counters,
            }),
            worker: None,
        })
    }

    /// The disk, unless a thread has it.
    fn disk_at_rest(&mut self) -> Option<&mut Disk> {
        match &mut self.worker {
            Some(worker) => worker.at_rest().map(|handler| &mut handler.disk),
            None => self.disk.as_mut(),
        }
    }

    /// Requests, bytes read, bytes written.
    pub fn counters(&self) -> Arc<Counters<3>> {
        Arc::clone(&self.counters)
    }
}

/// `struct virtio_blk_config` (virtio 1.3 §5.2.4).
fn configuration(sectors: u64, block: u32, granularity: u64) -> Vec<u8> {
    let in_units = |bytes: u64, unit: u64| u32::try_from(bytes / unit.max(1)).unwrap_or(u32::MAX);
    let blocks = in_units(PHYSICAL, block.into());
    let mut config = Vec::with_capacity(60);
    config.extend(sectors.to_le_bytes());
    config.extend(0u32.to_le_bytes()); // size_max
    config.extend(SEGMENTS.to_le_bytes());
    config.extend([0; 4]); // geometry
    config.extend(block.to_le_bytes()); // blk_size
    // Those in a physical block, as a power of 2; the first one is aligned.
    config.extend([blocks.checked_ilog2().unwrap_or(0) as u8, 0]);
    config.extend((blocks as u16).to_le_bytes()); // min_io_size, in blocks
    config.extend(in_units(granularity, block.into()).to_le_bytes()); // opt_io_size, likewise
    config.extend([0; 4]); // writeback, unused, num_queues
    for _ in 0..2 {
        // For discard: sectors, segments, alignment; for write zeroes: sectors, segments, may_unmap.
        config.extend(MAX_ZEROES.to_le_bytes());
        config.extend(1u32.to_le_bytes());
        config.extend(if config.len() < 48 { in_units(granularity, SECTOR) } else { 1 }.to_le_bytes());
    }
    config
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u16 {
        2
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.reset();
        let given = Given::new(&self.name, activation)?;
        let interrupt = given.interrupt.clone();
        let disk = self
            .disk
            .take()
            .ok_or_else(|| Error::Device(format!("{}: lost when its thread did not start", self.name)))?;
        self.worker = Some(Worker::spawn(&self.name, interrupt, BlockHandler::new(given, disk))?);
        Ok(())
    }

    fn worker(&mut self) -> Option<&mut dyn Working> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Working)
    }

    /// Leaves in the file all that the guest has written, so that it can be frozen.
    fn write_out(&mut self) -> Result<(), Error> {
        let Some(disk) = self.disk_at_rest().filter(|disk| !disk.source.read_only) else { return Ok(()) };
        disk.image.write_metadata().map_err(|source| Error::Io {
            device: disk.device.clone(),
            action: "write its metadata",
            source,
        })
    }

    /// Goes on in the file that is at the disk's path now: an overlay, if the one before was frozen.
    fn resume(&mut self) -> Result<(), Error> {
        self.disk_at_rest().map_or(Ok(()), Disk::follow)?;
        self.worker.as_mut().map_or(Ok(()), Worker::resume)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.disk = worker.stop().map(|handler| handler.disk);
        }
        if let Some(disk) = &mut self.disk {
            disk.close();
        }
    }
}

/// The disk itself, which goes from the device to its thread and back.
struct Disk {
    /// For messages.
    device: String,
    serial: String,
    sectors: u64,
    source: DiskConfig,
    image: Image,
    counters: Arc<Counters<3>>,
}

impl Disk {
    /// Writes what imago has not written yet.
    fn close(&mut self) {
        if !self.source.read_only
            && let Err(e) = self.image.write_metadata()
        {
            complain(&self.device, format_args!("cannot write its metadata: {e}"));
        }
    }

    /// Opens what is at the disk's path now, if that is another file than the one that is open.
    fn follow(&mut self) -> Result<(), Error> {
        let error = |action, source| Error::Io { device: self.device.clone(), action, source };
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let open = self.image.file().metadata().map(id).map_err(|e| error("look at it", e))?;
        // A file without a name is as good as before.
        let there = fs::metadata(&self.source.path).map(id).unwrap_or(open);
        if self.source.read_only || there == open {
            return Ok(());
        }
        // The frozen file is read as a backing file from now on.
        flock(self.image.file(), FlockOperation::NonBlockingLockShared)
            .map_err(|e| error("share its lock", e.into()))?;
        qcow2::qemu_locks::keep_reading(self.image.file());
        let image = Image::open(&self.source)?;
        if image.size() / SECTOR != self.sectors {
            return Err(Error::Device(format!(
                "{}: another one of another size lies in its place",
                self.device
            )));
        }
        self.image = image;
        Ok(())
    }

    /// Does what a request asks for.
    fn execute(&mut self, request: &Request<'_>) -> io::Result<()> {
        self.counters.add(REQUESTS, 1);
        match &request.transfer {
            Transfer::Read { offset, data } => {
                self.image.read(data, *offset)?;
                self.counters.add(READ, data.len() as u64);
            }
            Transfer::Write { offset, data } => {
                self.image.write(data, *offset)?;
                self.counters.add(WRITTEN, data.len() as u64);
            }
            Transfer::Flush => self.image.flush()?,
            Transfer::Discard { offset, length } => self.image.discard(*offset, *length)?,
            Transfer::Zeroes { offset, length, unmap } => {
                self.image.write_zeroes(*offset, *length, *unmap)?;
            }
            Transfer::Serial { data } => {
                // Zero-terminated only if it is shorter than its 20 bytes.
                let mut serial = [0; 20];
                for (to, from) in serial.iter_mut().zip(self.serial.as_bytes()) {
                    *to = *from;
                }
                data.write(&serial);
            }
        }
        Ok(())
    }
}

struct BlockHandler {
    memory: GuestMemoryMmap,
    queue: DeviceQueue,
    disk: Disk,
    /// The driver never flushes, so every write must be durable when it completes (virtio 1.3 §5.2.6.2).
    write_through: bool,
}

impl BlockHandler {
    fn new(given: Given<1>, disk: Disk) -> Self {
        let [queue] = given.queues;
        let write_through = given.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        Self { memory: given.memory, queue, disk, write_through }
    }

    fn work(&mut self) -> Result<(), Fault> {
        self.queue.silence(&self.memory)?;
        // As much as fits into the ring at once, then other events are looked at.
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                self.queue.tell(&self.memory)?;
                if self.queue.listen(&self.memory)? {
                    self.queue.silence(&self.memory)?;
                    continue;
                }
                return Ok(());
            };
            let head = chain.head;
            // The status is the last byte, so all counts as written (virtio 1.3 §2.7.8).
            let length = chain.writable.len();
            let limits =
                request::Limits { sectors: self.disk.sectors, read_only: self.disk.source.read_only };
            let (status, code) = match request::parse(chain, &limits) {
                Ok(Ok(request)) => {
                    // What is done already must not wait for what takes long.
                    if self.queue.untold() >= BATCH || request.transfer.size() >= SLOW {
                        self.queue.tell(&self.memory)?;
                    }
                    let mut outcome = self.disk.execute(&request);
                    if self.write_through && request.transfer.writes() && outcome.is_ok() {
                        outcome = self.disk.image.flush();
                    }
                    if let Err(e) = &outcome {
                        complain(&self.disk.device, format_args!("cannot {}: {e}", request.transfer.name()));
                    }
                    (request.status, if outcome.is_ok() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR })
                }
                Ok(Err(refused)) => (refused.status, refused.code),
                Err(what) => return Err(self.queue.fault(what)),
            };
            // VIRTIO_BLK_S_* fit into a byte.
            status.write(&[code as u8]);
            self.queue.push(&self.memory, head, length)?;
        }
        self.queue.tell(&self.memory)?;
        self.queue.ring();
        Ok(())
    }
}

impl Handler for BlockHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.queue.start(&self.memory, poll)
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Fault> {
        self.work()
    }

    fn queues(&mut self) -> Vec<&mut DeviceQueue> {
        vec![&mut self.queue]
    }
}
