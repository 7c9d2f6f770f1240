//! `carole.h` is what the sources say.

use std::path::Path;

#[test]
fn the_committed_header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is valid");
    let mut fresh = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_crate(root)
        .generate()
        .expect("the sources can be read")
        .write(&mut fresh);
    let fresh = String::from_utf8(fresh).expect("a header is text");
    let path = root.join("carole.h");
    if std::env::var("CAROLE_HEADER").as_deref() == Ok("write") {
        std::fs::write(&path, &fresh).expect("carole.h can be written");
    }
    let committed = std::fs::read_to_string(&path).expect("carole.h is committed");
    assert!(
        committed == fresh,
        "carole.h is out of date; run: CAROLE_HEADER=write cargo test -p carole-c --test header"
    );
}
