//! A safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = model::weights::safetensors::from_bytes(bytes.to_vec());
});
