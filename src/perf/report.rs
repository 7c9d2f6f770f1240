//! Rows, as a table and as JSON.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

/// What was found for one size.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// Bytes, as the collective counts them.
    pub bytes: u64,
    /// Elements of that size.
    pub elements: u64,
    /// Timed calls.
    pub iterations: u32,
    /// Half of the calls took at most this long.
    pub median_us: f64,
    /// A tenth of them took at most this long.
    pub p10_us: f64,
    /// Nine tenths of them took at most this long.
    pub p90_us: f64,
    /// Size divided by the median time.
    pub algorithm_gbs: f64,
    /// That times the factor of the collective.
    pub bus_gbs: f64,
    /// Elements, over all ranks, that differ from the expectation.
    pub wrong: u64,
    /// The algorithm that was really used; none where nothing moves.
    pub algorithm: &'static str,
    /// The transports of the links that were really used, over all ranks.
    pub transport: String,
}

/// What holds for all rows.
#[derive(Clone, Debug)]
pub(super) struct Heading {
    pub collective: &'static str,
    pub ranks: u32,
    pub dtype: &'static str,
    pub op: Option<&'static str>,
    pub transport: String,
    pub algorithm: String,
    pub in_place: bool,
}

pub(super) fn heading(heading: &Heading) -> String {
    let mut text = format!(
        "# {} on {} ranks, {}{}{}, asked for transport {}, algorithm {}\n",
        heading.collective,
        heading.ranks,
        heading.dtype,
        heading.op.map(|op| format!(" {op}")).unwrap_or_default(),
        if heading.in_place { ", in place" } else { "" },
        heading.transport,
        heading.algorithm,
    );
    let _ = write!(
        text,
        "{:>12} {:>12} {:>6} {:>12} {:>10} {:>10} {:>9} {:>9} {:>8}  {:<13} transport",
        "bytes",
        "elements",
        "calls",
        "median us",
        "p10 us",
        "p90 us",
        "alg GB/s",
        "bus GB/s",
        "wrong",
        "algorithm"
    );
    text
}

pub(super) fn line(row: &Row) -> String {
    format!(
        "{:>12} {:>12} {:>6} {:>12.2} {:>10.2} {:>10.2} {:>9.3} {:>9.3} {:>8}  {:<13} {}",
        row.bytes,
        row.elements,
        row.iterations,
        row.median_us,
        row.p10_us,
        row.p90_us,
        row.algorithm_gbs,
        row.bus_gbs,
        row.wrong,
        row.algorithm,
        row.transport
    )
}

/// All rows. The names are our own or come from checked enumerations; the two that a user writes are escaped.
pub(super) fn json(heading: &Heading, rows: &[Row]) -> String {
    let mut text = String::from("{\n");
    let _ = writeln!(text, "  \"collective\": {},", quoted(heading.collective));
    let _ = writeln!(text, "  \"ranks\": {},", heading.ranks);
    let _ = writeln!(text, "  \"dtype\": {},", quoted(heading.dtype));
    let _ = writeln!(text, "  \"op\": {},", heading.op.map_or_else(|| "null".to_owned(), quoted));
    let _ = writeln!(text, "  \"transport\": {},", quoted(&heading.transport));
    let _ = writeln!(text, "  \"algorithm\": {},", quoted(&heading.algorithm));
    let _ = writeln!(text, "  \"in_place\": {},", heading.in_place);
    text.push_str("  \"rows\": [");
    for (i, row) in rows.iter().enumerate() {
        let _ = write!(
            text,
            "{}\n    {{\"bytes\": {}, \"elements\": {}, \"iterations\": {}, \"median_us\": {:.3}, \
             \"p10_us\": {:.3}, \"p90_us\": {:.3}, \"algorithm_gbs\": {:.6}, \"bus_gbs\": {:.6}, \"wrong\": {}, \
             \"algorithm\": {}, \"transport\": {}}}",
            if i == 0 { "" } else { "," },
            row.bytes,
            row.elements,
            row.iterations,
            row.median_us,
            row.p10_us,
            row.p90_us,
            row.algorithm_gbs,
            row.bus_gbs,
            row.wrong,
            quoted(row.algorithm),
            quoted(&row.transport)
        );
    }
    text.push_str("\n  ]\n}\n");
    text
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value below which this share of the sorted values lies.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    assert!(!sorted.is_empty(), "at least one call was timed");
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        let sorted = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&sorted, 0.5), 2.5);
        assert_eq!(quantile(&sorted, 0.0), 1.0);
        assert_eq!(quantile(&sorted, 1.0), 4.0);
        assert_eq!(quantile(&[7.0], 0.9), 7.0);
    }

    #[test]
    fn what_a_user_writes_is_escaped() {
        assert_eq!(quoted("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
    }
}
