//! `carole-perf explain COLLECTIVE --scale`: predicted time against ranks and hosts on three networks, as a table and
//! (with `--plot FILE.svg`) as a picture. Nothing is run; these are the prices by which algorithms are chosen.
#![forbid(unsafe_code)]

use super::plot::{Curve, Panel, svg};
use crate::algorithm::Query;
use crate::cost::{Prices, Wire};
use crate::select::{Nanoseconds, WINDOW_BYTES, price_ns, select};
use std::fmt::Write as _;
use std::path::Path;

/// Gbit/s of a host's port in each direction, and the latency of a small message in microseconds: what such networks
/// have with TCP.
const NETWORKS: [(f64, f64); 3] = [(10.0, 25.0), (100.0, 15.0), (400.0, 10.0)];
const ALGORITHMS: [&str; 4] = ["ring", "tree", "doubling", "hierarchical"];
const RANKS_MAX: u32 = 4096;

/// A predicted time, where there is one.
type Price = Option<u64>;

/// One number of ranks on one network.
struct Row {
    ranks: u32,
    hosts: u32,
    prices: [Price; ALGORITHMS.len()],
    chosen: (&'static str, u64),
}

/// The table for a query, of which only the hosts are replaced; also writes the picture.
pub(super) fn table(query: &Query, per_host: u32, plot: Option<&Path>) -> Result<String, String> {
    let mut text = String::new();
    let mut panels = Vec::new();
    let _ = writeln!(
        text,
        "predicted time of {} of {} bytes, {per_host} ranks on each host, by the prices that choose algorithms",
        query.collective, query.bytes
    );
    for (gbits, latency_us) in NETWORKS {
        let between_hosts = Wire::network(gbits, latency_us);
        let prices = Prices { between_hosts, ..Prices::default() };
        let rows = rows(query, per_host, &prices);
        let _ = writeln!(text, "\n{gbits} Gbit/s, {latency_us} us between hosts");
        let _ = write!(text, "{:>6} {:>6}", "ranks", "hosts");
        ALGORITHMS.iter().for_each(|name| {
            let _ = write!(text, " {name:>12}");
        });
        let _ = writeln!(text, "  chosen");
        for row in &rows {
            let _ = write!(text, "{:>6} {:>6}", row.ranks, row.hosts);
            for price in row.prices {
                let cell = price.map_or("-".to_owned(), |ns| Nanoseconds(ns).to_string());
                let _ = write!(text, " {cell:>12}");
            }
            let (name, ns) = row.chosen;
            let _ = writeln!(text, "  {name} ({})", Nanoseconds(ns));
        }
        panels.push(panel(&rows, gbits));
    }
    if let Some(path) = plot {
        let title = format!("{} of {} bytes, {per_host} ranks on each host", query.collective, query.bytes);
        std::fs::write(path, svg(&title, &panels))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let _ = writeln!(text, "\nplot: {}", path.display());
    }
    Ok(text)
}

fn rows(query: &Query, per_host: u32, prices: &Prices) -> Vec<Row> {
    let counts = std::iter::successors(Some(2), |ranks| Some(ranks * 2)).take_while(|r| *r <= RANKS_MAX);
    counts
        .map(|ranks| {
            let query = Query { hosts: (0..ranks).map(|rank| rank / per_host).collect(), ..query.clone() };
            let choice = select(&query, prices, None, WINDOW_BYTES);
            Row {
                ranks,
                hosts: ranks.div_ceil(per_host),
                prices: ALGORITHMS.map(|name| price_ns(&query, prices, name)),
                chosen: (choice.algorithm.name, choice.reason.ns()),
            }
        })
        .collect()
}

fn panel(rows: &[Row], gbits: f64) -> Panel {
    let curve = |(i, name): (usize, &&'static str)| Curve {
        name,
        points: rows
            .iter()
            .filter_map(|row| Some((f64::from(row.ranks), row.prices[i]? as f64 / 1e6)))
            .collect(),
    };
    Panel {
        title: format!("{gbits} Gbit/s"),
        curves: ALGORITHMS.iter().enumerate().map(curve).filter(|curve| !curve.points.is_empty()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Collective, DType, ReduceOp};

    fn query(bytes: u64) -> Query {
        Query {
            collective: Collective::Allreduce,
            op: ReduceOp::Sum,
            dtype: DType::F32,
            bytes,
            hosts: [0].into(),
            root: 0,
            prescaled: false,
            strict: false,
        }
    }

    #[test]
    fn the_table_goes_to_4096_ranks_on_three_networks() {
        let directory = tempfile::tempdir().expect("a directory");
        let plot = directory.path().join("scale.svg");
        let text = table(&query(64 << 20), 8, Some(&plot)).expect("a table");
        let rows = |ranks: &str| text.lines().filter(|line| line.trim_start().starts_with(ranks)).count();
        assert_eq!((rows("4096 "), rows("2 ")), (3, 3), "{text}");
        let picture = std::fs::read_to_string(&plot).expect("written");
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
        // On one host there is nothing to be hierarchical about.
        assert_eq!(picture.matches("<polyline").count(), 3 * 4);
        assert!(picture.contains("400 Gbit/s") && picture.contains("hierarchical"));
    }

    #[test]
    fn a_faster_network_is_never_slower_and_more_ranks_cost_latency() {
        let (slow, fast) = (NETWORKS[0], NETWORKS[2]);
        let on = |(gbits, latency_us): (f64, f64)| {
            let prices = Prices { between_hosts: Wire::network(gbits, latency_us), ..Prices::default() };
            rows(&query(1 << 20), 8, &prices)
        };
        let (slow, fast) = (on(slow), on(fast));
        for (slow, fast) in slow.iter().zip(&fast).filter(|(row, _)| row.hosts > 1) {
            assert!(slow.prices.iter().zip(&fast.prices).all(|(s, f)| s >= f), "{} ranks", slow.ranks);
            assert!(slow.chosen.1 >= fast.chosen.1);
        }
        let ring = |row: &Row| row.prices[0].expect("a ring always fits");
        assert!(ring(&slow[slow.len() - 1]) > 4 * ring(&slow[4]), "a ring's latency grows with its hosts");
    }

    #[test]
    fn a_picture_that_cannot_be_written_is_an_error() {
        let nowhere = Path::new("/nonexistent/scale.svg");
        assert!(table(&query(1024), 8, Some(nowhere)).unwrap_err().contains("cannot write"));
    }
}
