//! The kernels' sources and how they are compiled, so that what is embedded can be held against them.
#![forbid(unsafe_code)]

use super::launch::Module;
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// All files that kernels are made from.
pub const SOURCES: [(&str, &str); 8] = [
    ("adasum.cu", include_str!("../../../kernels/adasum.cu")),
    ("copy.cu", include_str!("../../../kernels/copy.cu")),
    ("form.cuh", include_str!("../../../kernels/form.cuh")),
    ("map.cu", include_str!("../../../kernels/map.cu")),
    ("number.cuh", include_str!("../../../kernels/number.cuh")),
    ("reduce.cu", include_str!("../../../kernels/reduce.cu")),
    ("table.def", include_str!("../../../kernels/table.def")),
    ("walk.cuh", include_str!("../../../kernels/walk.cuh")),
];

/// The compiler, as PyPI has it. An old one, because a driver takes PTX from compilers that are no newer than
/// itself: this one's runs on every driver since 525 (CUDA 12.0).
pub const COMPILER: &str = "nvidia-cuda-nvrtc-cu12==12.0.140";

/// Its options. The oldest device that has what the kernels use; the driver translates for newer ones. Products
/// and sums stay apart, as on the host; subnormals are kept and divisions are exact by default.
pub const OPTIONS: [&str; 3] = ["--gpu-architecture=compute_70", "--std=c++17", "--fmad=false"];

/// What a module's PTX was made from: its sources, compiler and options.
#[must_use]
pub fn fingerprint(module: Module) -> String {
    let mut hash = Sha256::new();
    let definition = module.definition().unwrap_or_default();
    let settings = [module.source(), &definition, COMPILER].into_iter().chain(OPTIONS);
    let own = SOURCES.iter().filter(|(name, _)| !name.ends_with(".cu") || *name == module.source());
    for text in settings.chain(own.flat_map(|(name, text)| [*name, *text])) {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(&hash.finalize())
}

/// A module as it is kept: the compiler's output without comments, below what it was made from and what it is.
#[must_use]
pub fn sealed(module: Module, ptx: &str) -> String {
    let lines = ptx.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    let body: String = lines.flat_map(|line| [line, "\n"]).collect();
    format!("{}{}", seal(module, &body), body)
}

/// Why a kept module is not what the sources make; none when it is.
#[must_use]
pub fn breach(module: Module, kept: &str) -> Option<String> {
    let body = kept.splitn(3, '\n').nth(2).unwrap_or_default();
    let head = &kept[..kept.len() - body.len()];
    if head == seal(module, body) {
        return None;
    }
    let name = module.name();
    Some(if head.lines().next() == seal(module, body).lines().next() {
        format!("kernels/ptx/{name}.ptx was edited; `cargo run -p ci -- ptx` makes it again")
    } else {
        format!("kernels/ptx/{name}.ptx is not made from kernels/; `cargo run -p ci -- ptx` makes it again")
    })
}

/// The first two lines of a kept module.
fn seal(module: Module, body: &str) -> String {
    let body = hex(&Sha256::digest(body));
    format!("// Made by `cargo run -p ci -- ptx` from {}\n// and is {body}\n", fingerprint(module))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_breaks() {
        let module = Module::Copy;
        let kept = sealed(module, "//\n// Generated\n\t.version 8.0\n\n\tret; \n");
        assert!(kept.ends_with("\n.version 8.0\nret;\n"));
        assert_eq!(breach(module, &kept), None);
        assert!(breach(module, &kept.replace("ret", "trap")).is_some_and(|words| words.contains("edited")));
        assert!(breach(Module::Map, &kept).is_some_and(|words| words.contains("not made from")));
        assert!(breach(module, "").is_some());
    }

    #[test]
    fn a_module_depends_on_its_own_sources() {
        let mut all: Vec<String> = Module::all().map(fingerprint).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
