//! The kernels as PTX, which the driver translates for its device when a module is first used.
#![forbid(unsafe_code)]

use super::launch::Module;
use crate::types::DType;
use lzma_rust2::LzmaReader;
use std::ffi::CString;
use std::io::Read;

/// A module of `kernels/ptx`, as `kernels/build.rs` packed it.
macro_rules! ptx {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".ptx.lzma"))
    };
}

/// A module's PTX.
#[must_use]
pub fn of(module: Module) -> CString {
    let mut text = Vec::new();
    LzmaReader::new_mem_limit(packed(module), u32::MAX, None)
        .and_then(|mut reader| reader.read_to_end(&mut text))
        .expect("what the build packed can be unpacked");
    CString::new(text).expect("PTX is text")
}

fn packed(module: Module) -> &'static [u8] {
    match module {
        Module::Copy => ptx!("copy"),
        Module::Map => ptx!("map"),
        Module::Adasum => ptx!("adasum"),
        Module::Reduce(dtype) => match dtype {
            DType::U8 => ptx!("reduce_U8"),
            DType::I8 => ptx!("reduce_I8"),
            DType::U16 => ptx!("reduce_U16"),
            DType::I16 => ptx!("reduce_I16"),
            DType::I32 => ptx!("reduce_I32"),
            DType::I64 => ptx!("reduce_I64"),
            DType::F16 => ptx!("reduce_F16"),
            DType::F32 => ptx!("reduce_F32"),
            DType::F64 => ptx!("reduce_F64"),
            DType::Bool => ptx!("reduce_Bool"),
            DType::BF16 => ptx!("reduce_BF16"),
            DType::U32 => ptx!("reduce_U32"),
            DType::U64 => ptx!("reduce_U64"),
            DType::C64 => ptx!("reduce_C64"),
            DType::C128 => ptx!("reduce_C128"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::launch::Kernel;

    #[test]
    fn every_kernel_is_embedded() {
        for module in Module::all() {
            let text = of(module).into_string().expect("PTX is ASCII");
            for kernel in Kernel::all().into_iter().filter(|kernel| kernel.module() == module) {
                assert!(text.contains(&format!(".entry {}(", kernel.name())), "{kernel:?}");
            }
        }
    }
}
