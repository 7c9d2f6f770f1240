//! Signatures: whatever decodes fits, and encodes to the same bytes.
#![no_main]

use carole::wire::Reader;
use carole::wire::signature::{fits, put_signature, signature};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut reader = Reader::new(bytes);
    if let Ok(it) = signature(&mut reader) {
        assert_eq!(fits(&it), Ok(()));
        let mut again = Vec::new();
        put_signature(&mut again, &it);
        assert_eq!(again, &bytes[..bytes.len() - reader.remaining()]);
    }
});
