//! The kernels as PTX, which the driver translates for its device when a module is first used.
#![forbid(unsafe_code)]

use super::launch::Module;
use crate::types::DType;

/// The text of a module in `kernels/ptx`, with the zero byte that the driver looks for.
macro_rules! ptx {
    ($name:literal) => {
        concat!(include_str!(concat!("../../../kernels/ptx/", $name, ".ptx")), "\0")
    };
}

/// A module's PTX, ended by a zero byte.
#[must_use]
pub fn of(module: Module) -> &'static str {
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
        for kernel in Kernel::all() {
            let entry = format!(".entry {}(", kernel.name());
            assert!(of(kernel.module()).contains(&entry), "{kernel:?}");
        }
    }
}
