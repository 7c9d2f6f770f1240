//! Curves on logarithmic axes, side by side, as SVG: a picture that every browser shows, without a library.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

/// One curve.
pub(super) struct Curve {
    pub name: &'static str,
    /// (ranks, milliseconds); both above 0.
    pub points: Vec<(f64, f64)>,
}

/// One pair of axes.
pub(super) struct Panel {
    pub title: String,
    pub curves: Vec<Curve>,
}

const COLOURS: [&str; 4] = ["#1b6ca8", "#c1440e", "#3a7d44", "#7b2d8b"];
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 58.0;
const TOP: f64 = 56.0;
const GAP: f64 = 20.0;

/// The range of all panels, so that they can be compared: powers of two across, powers of ten upwards.
struct Axes {
    ranks: (f64, f64),
    ms: (f64, f64),
}

impl Axes {
    fn of(panels: &[Panel]) -> Axes {
        let points = || panels.iter().flat_map(|p| &p.curves).flat_map(|c| c.points.iter().copied());
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let ranks = range(&mut points().map(|p| p.0.log2()));
        let (low, high) = range(&mut points().map(|p| p.1.log10()));
        Axes {
            ranks: (ranks.0, ranks.1.max(ranks.0 + 1.0)),
            ms: (low.floor(), high.ceil().max(low.floor() + 1.0)),
        }
    }
    fn x(&self, ranks: f64) -> f64 {
        (ranks.log2() - self.ranks.0) / (self.ranks.1 - self.ranks.0) * WIDTH
    }
    fn y(&self, ms: f64) -> f64 {
        HEIGHT - (ms.log10() - self.ms.0) / (self.ms.1 - self.ms.0) * HEIGHT
    }
}

/// The picture.
pub(super) fn svg(title: &str, panels: &[Panel]) -> String {
    let axes = Axes::of(panels);
    let width = LEFT + panels.len() as f64 * (WIDTH + GAP);
    let height = TOP + HEIGHT + 70.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">predicted time of {title}</text>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        let left = LEFT + i as f64 * (WIDTH + GAP);
        let _ = writeln!(out, "<g transform=\"translate({left} {TOP})\">");
        draw(&mut out, panel, &axes, i == 0);
        out.push_str("</g>\n");
    }
    legend(&mut out, panels, height - 12.0);
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel, axes: &Axes, first: bool) {
    let _ = writeln!(out, "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#999\"/>");
    let _ =
        writeln!(out, "<text x=\"{}\" y=\"-8\" text-anchor=\"middle\">{}</text>", WIDTH / 2.0, panel.title);
    for power in axes.ms.0 as i32..=axes.ms.1 as i32 {
        let y = axes.y(10f64.powi(power));
        let _ = writeln!(out, "<path d=\"M0 {y:.1}H{WIDTH}\" stroke=\"#ddd\"/>");
        if first {
            let _ = writeln!(
                out,
                "<text x=\"-6\" y=\"{:.1}\" text-anchor=\"end\">{} ms</text>",
                y + 4.0,
                ten(power)
            );
        }
    }
    for power in (axes.ranks.0.ceil() as i32..=axes.ranks.1 as i32).filter(|power| power % 2 == 0) {
        let (x, ranks) = (axes.x(2f64.powi(power)), 1u64 << power);
        let _ = writeln!(out, "<path d=\"M{x:.1} 0V{HEIGHT}\" stroke=\"#eee\"/>");
        let _ =
            writeln!(out, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{ranks}</text>", HEIGHT + 15.0);
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">ranks</text>",
        WIDTH / 2.0,
        HEIGHT + 30.0
    );
    for (i, curve) in panel.curves.iter().enumerate() {
        let points: Vec<String> =
            curve.points.iter().map(|&(r, ms)| format!("{:.1},{:.1}", axes.x(r), axes.y(ms))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.8\"><title>{}</title></polyline>",
            points.join(" "),
            COLOURS[i % COLOURS.len()],
            curve.name
        );
    }
}

fn legend(out: &mut String, panels: &[Panel], y: f64) {
    let curves = panels.first().map_or(&[][..], |panel| &panel.curves);
    for (i, curve) in curves.iter().enumerate() {
        let (x, colour) = (LEFT + i as f64 * 110.0, COLOURS[i % COLOURS.len()]);
        let _ = writeln!(out, "<path d=\"M{x} {}h18\" stroke=\"{colour}\" stroke-width=\"3\"/>", y - 4.0);
        let _ = writeln!(out, "<text x=\"{}\" y=\"{y}\">{}</text>", x + 23.0, curve.name);
    }
}

/// A power of ten as people write it.
fn ten(power: i32) -> String {
    match power {
        0.. => format!("1{}", "0".repeat(power as usize)),
        _ => format!("0.{}1", "0".repeat((-power - 1) as usize)),
    }
}
