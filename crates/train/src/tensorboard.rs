//! TensorBoard event files, as bytes.
//!
//! A file is a row of records `length: u64 | crc(length): u32 | data | crc(data): u32`, little-endian, with masked CRC-32C
//! sums (TensorFlow's TFRecord format); each record holds an `Event` message in protobuf encoding.
//!
//! TensorBoard wants a wall-clock time in every event. The clock would make two equal runs differ, so the step number
//! stands in its place: the "relative" axis then counts steps as if each took a second. Real times are in `timing.jsonl`.

use crate::metrics::Metrics;

/// The name of the event file inside `runs/`. TensorBoard looks for `tfevents` in the name.
pub const FILE_NAME: &str = "events.out.tfevents.0.posttrain";

/// The record that opens a file.
pub fn header() -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, 0.0);
    event.bytes(3, b"brain.Event:2");
    record(&event.0)
}

/// The record of all metrics of a step.
pub fn scalars(step: u64, metrics: &Metrics) -> Vec<u8> {
    let mut summary = Message::default();
    for (name, value) in metrics.iter() {
        let mut scalar = Message::default();
        scalar.bytes(1, name.as_bytes());
        scalar.float(2, value as f32);
        summary.bytes(1, &scalar.0);
    }
    let mut event = Message::default();
    event.double(1, step as f64);
    event.integer(2, step);
    event.bytes(5, &summary.0);
    record(&event.0)
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn integer(&mut self, field: u32, value: u64) {
        self.variable(u64::from(field << 3));
        self.variable(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.variable(u64::from(field << 3 | 1));
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.variable(u64::from(field << 3 | 2));
        self.variable(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u32, value: f32) {
        self.variable(u64::from(field << 3 | 5));
        self.0.extend(value.to_le_bytes());
    }

    /// Base 128, lowest group first.
    fn variable(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(data);
    record.extend(masked(crc32c(data)).to_le_bytes());
    record
}

/// TensorFlow's mask, which keeps sums of data that itself contains sums apart.
fn masked(sum: u32) -> u32 {
    sum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: an event is a few hundred bytes a step.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check value of the CRC catalogue, and the published vectors of RFC 3720, B.4.
    #[test]
    fn crc_known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}
