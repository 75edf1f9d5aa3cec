//! A `config.json`. Whatever is accepted must be safe to size things by, and come back as it was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::ModelConfig;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = ModelConfig::from_json_bytes(bytes) {
        config.parameter_count();
        let written = config.to_json();
        let again = ModelConfig::from_json(&written).expect("what was written can be read");
        assert_eq!(again.to_json(), written);
    }
});
