//! The table of kernels, `kernels/table.def`, read as text: the same rows that the kernels are made from.
#![forbid(unsafe_code)]

use crate::types::{DType, ReduceOp};

/// The table as it lies beside the kernels.
pub const TABLE: &str = include_str!("../../../kernels/table.def");

/// One row: which element carries out which operation of which type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// The type of the tensor.
    pub dtype: DType,
    /// The element of the kernels.
    pub element: &'static str,
    /// The operation.
    pub op: ReduceOp,
}

/// The arguments of every row `KIND(…)`.
pub fn rows(kind: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    TABLE.lines().filter_map(move |line| {
        let arguments = line.strip_prefix(kind)?.strip_prefix('(')?.strip_suffix(')')?;
        Some(arguments.split(',').map(str::trim).collect())
    })
}

/// Every reduction that there is a kernel for.
pub fn reductions() -> impl Iterator<Item = Row> {
    rows("REDUCTION").map(|row| match row[..] {
        [dtype, element, op] => Row { dtype: of_name(dtype), element, op: op_of_name(op) },
        _ => panic!("a row of reductions has a type, an element and an operation"),
    })
}

/// Every conversion that there is a kernel for: from, to.
pub fn casts() -> impl Iterator<Item = (DType, DType)> {
    rows("CAST").map(|row| (of_name(row[0]), of_name(row[1])))
}

/// The types of the rows `KIND(type, element)`.
pub fn types(kind: &'static str) -> impl Iterator<Item = (DType, &'static str)> {
    rows(kind).map(|row| (of_name(row[0]), row[1]))
}

fn of_name(name: &str) -> DType {
    let found = DType::ALL.iter().find(|dtype| format!("{dtype:?}") == name);
    *found.unwrap_or_else(|| panic!("kernels/table.def names the type {name}, which does not exist"))
}

fn op_of_name(name: &str) -> ReduceOp {
    let found = ReduceOp::ALL.iter().find(|op| format!("{op:?}") == name);
    *found.unwrap_or_else(|| panic!("kernels/table.def names the operation {name}, which does not exist"))
}

#[cfg(test)]
mod tests {
    use super::super::launch::part_bytes;
    use super::*;
    use crate::device::Reduction;
    use crate::device::host;

    #[test]
    fn the_table_is_the_hosts() {
        let ours: Vec<_> = reductions().map(|row| (row.dtype, row.op, row.element.to_owned())).collect();
        assert_eq!(ours, host::reductions());
        let elements: Vec<_> = types("ELEMENT").map(|(dtype, element)| (dtype, element.to_owned())).collect();
        assert_eq!(elements, host::elements());
        let reals: Vec<_> = types("REAL").map(|(dtype, element)| (dtype, element.to_owned())).collect();
        assert_eq!(reals, host::reals());
    }

    #[test]
    fn the_table_has_every_operation_that_is_accepted() {
        for &dtype in DType::ALL {
            for &op in ReduceOp::ALL {
                let elementwise = !matches!(op, ReduceOp::Average | ReduceOp::Adasum);
                let wanted = elementwise && op.accepts(dtype).is_ok();
                let rows = reductions().filter(|row| (row.dtype, row.op) == (dtype, op)).count();
                assert_eq!(rows, usize::from(wanted), "{op} of {dtype}");
            }
        }
    }

    #[test]
    fn elements_have_the_size_that_rows_are_counted_in() {
        let size = |element: &str| match element {
            "u8" | "i8" | "Bool" => 1,
            "u16" | "i16" | "F16" | "BF16" => 2,
            "u32" | "i32" | "f32" => 4,
            "u64" | "i64" | "f64" | "Complex<f32>" => 8,
            "Complex<f64>" => 16,
            other => panic!("{other} has a size"),
        };
        for Row { dtype, element, op } in reductions() {
            assert_eq!(size(element), part_bytes(Reduction { dtype, op }), "{op} of {dtype}");
        }
        for (dtype, element) in types("ELEMENT") {
            assert_eq!(size(element), part_bytes(Reduction { dtype, op: ReduceOp::Sum }), "{dtype}");
        }
    }
}
