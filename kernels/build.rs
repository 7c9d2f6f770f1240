//! Packs `kernels/ptx` for embedding: 4 MB of text, in which every kernel resembles the next, become 0.3 MB.
//! Deflate, which a wheel applies anyway, looks back by 32 KiB only and leaves 0.85 MB.

fn main() {
    println!("cargo::rerun-if-changed=kernels/build.rs");
    #[cfg(feature = "cuda")]
    pack::all();
}

#[cfg(feature = "cuda")]
mod pack {
    use lzma_rust2::{LzmaOptions, LzmaWriter};
    use std::io::{Result, Write};
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    /// Writes each module of `kernels/ptx` to `OUT_DIR` as `<name>.ptx.lzma`.
    pub fn all() {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        println!("cargo::rerun-if-changed=kernels/ptx");
        for entry in fs::read_dir("kernels/ptx").expect("kernels/ptx is a folder") {
            let path = entry.expect("kernels/ptx can be listed").path();
            let name =
                path.file_name().expect("entries of a folder have names").to_string_lossy().into_owned();
            pack(&path, &out.join(name + ".lzma"))
                .unwrap_or_else(|why| panic!("packing {}: {why}", path.display()));
        }
    }

    fn pack(from: &Path, to: &Path) -> Result<()> {
        let text = fs::read(from)?;
        let mut writer =
            LzmaWriter::new_use_header(Vec::new(), &LzmaOptions::with_preset(6), Some(text.len() as u64))?;
        writer.write_all(&text)?;
        fs::write(to, writer.finish()?)
    }
}
