//! The few fixed registers of the machine: serial port, sleep, reset; and what ACPI's generic event device tells of: the
//! power button, and that the machine is a copy.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    ending::{End, Ending},
    layout,
};

/// Bits of the sleep control register (ACPI 6.5 §4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// "Pulse the reset line", a command of the keyboard controller.
const KEYBOARD_RESET: u8 = 0xfe;

/// An interrupt input that takes edges, joined by irqfd.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What the guest has written to the serial port's registers.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
}

/// Bit of the line control register that puts the divisor in the place of data and interrupt enable.
const DIVISOR_LATCH: u8 = 1 << 7;

/// The fixed registers of one machine.
pub struct Platform {
    serial: Mutex<Serial<Line, NoEvents, Box<dyn Write + Send>>>,
    button: Line,
    generation: Line,
    ending: Arc<Ending>,
}

impl Platform {
    /// Registers whose serial port writes to `output`; `serial_line`, `button_line` and `generation_line`
    /// raise interrupts [`layout::COM1_IRQ`], [`layout::GED_IRQ`] and [`layout::GENERATION_IRQ`].
    pub fn new(
        output: Box<dyn Write + Send>,
        serial_line: Line,
        button_line: Line,
        generation_line: Line,
        ending: Arc<Ending>,
    ) -> Self {
        Self {
            serial: Mutex::new(Serial::new(serial_line, output)),
            button: button_line,
            generation: generation_line,
            ending,
        }
    }

    /// Press the power button.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.button.trigger()
    }

    /// Tell the guest that its generation id is another one.
    pub fn tell_generation(&self) -> io::Result<()> {
        self.generation.trigger()
    }

    /// The state of the serial port.
    pub fn save(&self) -> SerialState {
        let state = self.serial().state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            line_control: state.line_control,
            modem_control: state.modem_control,
            scratch: state.scratch,
        }
    }

    /// Write what the guest wrote in another life. What it sent was sent at once, and nothing is ever sent to it.
    pub fn restore(&self, state: &SerialState) {
        let mut serial = self.serial();
        let [low, high] = state.divisor;
        let registers = [
            (3, DIVISOR_LATCH),
            (0, low),
            (1, high),
            (3, state.line_control & !DIVISOR_LATCH),
            (1, state.interrupt_enable),
            (3, state.line_control),
            (4, state.modem_control),
            (7, state.scratch),
        ];
        for (register, value) in registers {
            // Fails only where an interrupt cannot be raised, as for the guest's own writes.
            let _ = serial.write(register, value);
        }
    }

    /// Write a byte to a port.
    pub fn write(&self, port: u16, value: u8) {
        match port {
            layout::SLEEP_CONTROL => {
                let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == crate::acpi::SLEEP_TYPE_S5 {
                    self.ending.decide(End::PowerOff);
                }
            }
            layout::RESET if value == layout::RESET_VALUE => self.ending.decide(End::Reset),
            layout::KEYBOARD_COMMAND if value == KEYBOARD_RESET => self.ending.decide(End::Reset),
            _ => {
                if let Some(offset) = serial_register(port) {
                    // Output that cannot be written is lost, as with a cable that is not plugged in.
                    let _ = self.serial().write(offset, value);
                }
            }
        }
    }

    /// Read a byte from a port.
    pub fn read(&self, port: u16) -> u8 {
        match port {
            // Nothing to report: this machine does not wake up, it starts anew.
            layout::SLEEP_CONTROL | layout::SLEEP_STATUS | layout::RESET => 0,
            _ => serial_register(port).map_or(0xff, |offset| self.serial().read(offset)),
        }
    }

    fn serial(&self) -> std::sync::MutexGuard<'_, Serial<Line, NoEvents, Box<dyn Write + Send>>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(layout::COM1).filter(|offset| *offset < 8).map(|offset| offset as u8)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn platform() -> (Platform, Arc<Ending>, Arc<Mutex<Vec<u8>>>) {
        struct Shared(Arc<Mutex<Vec<u8>>>);
        impl Write for Shared {
            fn write(&mut self, data: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(data);
                Ok(data.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (ending, output) = (Arc::new(Ending::new().unwrap()), Arc::new(Mutex::new(Vec::new())));
        let line = || Line(EventFd::new(EFD_NONBLOCK).unwrap());
        let platform =
            Platform::new(Box::new(Shared(output.clone())), line(), line(), line(), ending.clone());
        (platform, ending, output)
    }

    #[test]
    fn only_s5_switches_off() {
        let (platform, ending, _) = platform();
        for value in (0..=255).filter(|v| *v & 0x3c != 0x34) {
            platform.write(layout::SLEEP_CONTROL, value);
        }
        assert_eq!(ending.end(), None);
        platform.write(layout::SLEEP_CONTROL, 0x34);
        assert_eq!(ending.end(), Some(End::PowerOff));
    }

    #[test]
    fn reset_register_and_keyboard_controller_reset() {
        for (port, value) in [(layout::RESET, layout::RESET_VALUE), (0x64, 0xfe)] {
            let (platform, ending, _) = platform();
            platform.write(port, 0);
            assert_eq!(ending.end(), None);
            platform.write(port, value);
            assert_eq!(ending.end(), Some(End::Reset));
        }
    }

    #[test]
    fn the_serial_port_writes_and_raises_its_interrupt() {
        let (platform, _, output) = platform();
        platform.write(layout::COM1 + 1, 2);
        for byte in b"hello" {
            platform.write(layout::COM1, *byte);
        }
        assert_eq!(*output.lock().unwrap(), b"hello");
        assert!(platform.serial().interrupt_evt().0.read().is_ok());
        assert_eq!(platform.read(0x80), 0xff, "nobody there");
    }

    #[test]
    fn the_button_raises_an_interrupt_once() {
        let (platform, ..) = platform();
        platform.press_power_button().unwrap();
        assert_eq!(platform.button.0.read().unwrap(), 1);
    }

    #[test]
    fn the_serial_port_comes_back() {
        let (before, ..) = platform();
        for (offset, value) in [(3, 0x80), (0, 12), (1, 1), (3, 0x03), (1, 0x02), (4, 0x0b), (7, 0x5a)] {
            before.write(layout::COM1 + offset, value);
        }
        let (after, _, output) = platform();
        after.restore(&before.save());
        assert_eq!(after.save(), before.save());
        assert_eq!((after.read(layout::COM1 + 7), after.read(layout::COM1 + 1)), (0x5a, 0x02));
        assert!(output.lock().unwrap().is_empty(), "nothing is sent twice");
    }
}
