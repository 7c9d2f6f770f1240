//! Every knob, declared once. [`Config::load`] takes each value from the first source that has one:
//! init() argument, launcher flag, `CAROLE_` variable, `HOROVOD_` variable, torchrun's variables,
//! configuration file, default; and remembers where it came from.
#![forbid(unsafe_code)]

mod file;
mod horovod;
mod knobs;
#[cfg(test)]
mod tests;
mod value;

pub use horovod::Convert;
pub use knobs::{Config, KNOBS, Knob, Scope};
pub use value::{AlgorithmName, LogLevel, Named, SimdLevel, TransportChoice, parse_bytes, show_bytes};

use crate::error::{Error, Result};
use std::fmt::{self, Write};

/// The sources of a value, weakest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Layer {
    /// The table's default.
    #[default]
    Default,
    /// The configuration file.
    File,
    /// torchrun's variables (RANK, WORLD_SIZE and so on).
    Torchrun,
    /// A `HOROVOD_` variable.
    Horovod,
    /// A `CAROLE_` variable.
    Carole,
    /// A flag of the launcher.
    Flag,
    /// An argument of init().
    Init,
}

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Origin {
    /// The kind of source.
    pub layer: Layer,
    /// The variable, flag, or file and line; empty for the default.
    pub name: String,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Layer::Default => f.write_str("default"),
            Layer::Init => write!(f, "init({})", self.name),
            _ => f.write_str(&self.name),
        }
    }
}

/// Something that the user may want to know, and that changes nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Warning {
    /// The words.
    pub message: String,
}

/// A value that some source offers for a knob.
struct Offer {
    /// The position in [`KNOBS`].
    knob: usize,
    origin: Origin,
    /// As the user wrote it.
    text: String,
    convert: Convert,
    /// Among offers of the same layer the smaller wins: the position in the knob's list of aliases.
    order: usize,
}

/// The variables of this process. Those that are not UTF-8 cannot be ours and are left out.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

impl Config {
    /// Finds the value of every knob. `overrides` are init()'s arguments, by variable (`CAROLE_ALGORITHM`) or
    /// by field (`algorithm`).
    ///
    /// # Errors
    /// A value that its knob does not allow, an override that does not exist, a configuration file that
    /// cannot be read, a rank without a size; with `CAROLE_STRICT_ENV=1` also an unknown variable.
    pub fn load(
        overrides: &[(String, String)],
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<(Config, Vec<Warning>)> {
        Config::load_with_flags(overrides, &[], environment)
    }

    /// As [`Config::load`], with the launcher's flags: (variable, value, flag).
    ///
    /// # Errors
    /// As for [`Config::load`].
    pub fn load_with_flags(
        overrides: &[(String, String)],
        flags: &[(String, String, String)],
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<(Config, Vec<Warning>)> {
        let mut offers = Vec::new();
        let mut unknown = Vec::new();
        let mut warnings = Vec::new();
        for (name, text) in overrides {
            offers.push(named_offer(name, text, Layer::Init, name)?);
        }
        for (name, text, flag) in flags {
            offers.push(named_offer(name, text, Layer::Flag, flag)?);
        }
        let environment: Vec<(String, String)> = environment.filter(|(_, text)| !text.is_empty()).collect();
        for (name, text) in &environment {
            offer_variable(name, text, &mut offers, &mut unknown, &mut warnings);
        }
        offer_torchrun(&environment, &mut offers);
        let mut config = Config::default();
        config.take(&offers)?;
        if let Some(path) = config.config_file.clone() {
            for entry in file::read(&path)? {
                offers.extend(entry.offer(&path, &mut warnings)?);
            }
            config.take(&offers)?;
        }
        for name in unknown {
            let message = unknown_variable(&name);
            if config.strict_env {
                return Err(Error::usage(format!("{message} (CAROLE_STRICT_ENV=1 makes this an error)")));
            }
            warnings.push(Warning { message });
        }
        config.check_identity()?;
        Ok((config, warnings))
    }

    /// Takes the strongest offer for each knob.
    fn take(&mut self, offers: &[Offer]) -> Result<()> {
        for (index, knob) in KNOBS.iter().enumerate() {
            let mut candidates: Vec<&Offer> = offers.iter().filter(|offer| offer.knob == index).collect();
            candidates.sort_by(|a, b| b.origin.layer.cmp(&a.origin.layer).then(a.order.cmp(&b.order)));
            for offer in candidates {
                let converted = (offer.convert)(offer.text.trim());
                let Some(text) = converted.map_err(|why| bad_value(knob, offer, &why))? else { continue };
                self.assign(knob.field, &text).map_err(|why| bad_value(knob, offer, &why))?;
                self.origins[index] = offer.origin.clone();
                break;
            }
        }
        Ok(())
    }

    /// A rank says nothing without a size, and the other way round.
    fn check_identity(&self) -> Result<()> {
        let pairs = [
            (("CAROLE_RANK", self.rank), ("CAROLE_SIZE", self.size)),
            (("CAROLE_LOCAL_RANK", self.local_rank), ("CAROLE_LOCAL_SIZE", self.local_size)),
            (("CAROLE_CROSS_RANK", self.cross_rank), ("CAROLE_CROSS_SIZE", self.cross_size)),
        ];
        for ((rank_name, rank), (size_name, size)) in pairs {
            match (rank, size) {
                (Some(rank), Some(size)) if rank >= size => {
                    return Err(Error::usage(format!(
                        "{rank_name} is {rank} (from {}) but {size_name} is {size} (from {}): ranks count from 0 \
                         to {}",
                        self.origin(rank_name),
                        self.origin(size_name),
                        size - 1
                    )));
                }
                (Some(_), None) => return Err(self.incomplete(rank_name, size_name)),
                (None, Some(_)) => return Err(self.incomplete(size_name, rank_name)),
                _ => {}
            }
        }
        if self.rank.is_none() && self.local_rank.is_some() {
            return Err(self.incomplete("CAROLE_LOCAL_RANK", "CAROLE_RANK"));
        }
        Ok(())
    }

    fn incomplete(&self, present: &str, missing: &str) -> Error {
        Error::usage(format!(
            "{present} is set (from {}) but {missing} is not; set both, or neither for a job of one process, or \
             start with carolerun, which sets them all",
            self.origin(present)
        ))
    }

    /// Where the value of this variable (or field) came from.
    ///
    /// # Panics
    /// When there is no such knob.
    #[must_use]
    pub fn origin(&self, name: &str) -> &Origin {
        &self.origins[find_knob(name).expect("a knob of the table")]
    }

    /// The knobs that must be the same on all ranks, in a fixed order, as text: what ranks compare when they
    /// meet.
    #[must_use]
    pub fn agreed(&self) -> Vec<(&'static str, String)> {
        let agreed = KNOBS.iter().filter(|knob| knob.scope == Scope::Agreed);
        agreed.map(|knob| (knob.name, self.show(knob.field))).collect()
    }

    /// The variables, with their values as text, that this kind of source has set: what the launcher's flags
    /// say to the ranks.
    #[must_use]
    pub fn set_by(&self, layer: Layer) -> Vec<(&'static str, String)> {
        let rows = KNOBS.iter().zip(&self.origins).filter(|(_, origin)| origin.layer == layer);
        rows.map(|(knob, _)| (knob.name, self.show(knob.field))).collect()
    }

    /// Every knob's variable and its value as text; none where nothing was set, so that the default holds.
    /// What torchrun's variables say is left out: they speak for themselves.
    pub fn settled(&self) -> impl Iterator<Item = (&'static str, Option<String>)> + '_ {
        KNOBS.iter().zip(&self.origins).map(|(knob, origin)| {
            let text = Some(self.show(knob.field)).filter(|text| text != knob.default);
            (knob.name, text.filter(|_| origin.layer != Layer::Torchrun))
        })
    }

    /// A table of every knob, its value, and where the value came from.
    #[must_use]
    pub fn print_config(&self) -> String {
        let mut out = format!("{:<26} {:<24} {}\n", "KNOB", "VALUE", "FROM");
        for (knob, origin) in KNOBS.iter().zip(&self.origins) {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{:<26} {:<24} {origin}", knob.name, self.show(knob.field));
        }
        out
    }
}

/// The manual of all knobs, printed from the table.
#[must_use]
pub fn manual() -> String {
    let mut out = String::new();
    for knob in KNOBS {
        let _ = writeln!(out, "{} (default {})", knob.name, knob.default);
        for line in knob.doc {
            let _ = writeln!(out, "    {}", line.trim());
        }
        let _ = writeln!(out, "    Allowed: {}.", (knob.allowed)());
        if !knob.aliases.is_empty() {
            let names: Vec<&str> = knob.aliases.iter().map(|(name, _)| *name).collect();
            let _ = writeln!(out, "    Also set by: {}.", names.join(", "));
        }
        let scope = match knob.scope {
            Scope::Agreed => "the same on all ranks",
            Scope::Local => "each rank may have its own",
        };
        let _ = writeln!(out, "    Scope: {scope}. In a file: {}.\n", knob.field);
    }
    out
}

fn find_knob(name: &str) -> Option<usize> {
    KNOBS.iter().position(|knob| knob.name == name || knob.field == name)
}

/// An offer by something that the user named on purpose: an unknown name is an error.
fn named_offer(name: &str, text: &str, layer: Layer, label: &str) -> Result<Offer> {
    let origin = Origin { layer, name: label.to_string() };
    let text = text.to_string();
    if let Some(knob) = find_knob(name) {
        return Ok(Offer { knob, origin, text, convert: horovod::as_is, order: 0 });
    }
    for (knob, row) in KNOBS.iter().enumerate() {
        if let Some(order) = row.aliases.iter().position(|(alias, _)| *alias == name) {
            return Ok(Offer { knob, origin, text, convert: row.aliases[order].1, order: order + 1 });
        }
    }
    Err(Error::usage(unknown_variable(name)))
}

/// An offer by a variable of the environment; foreign variables are none of our business.
fn offer_variable(
    name: &str,
    text: &str,
    offers: &mut Vec<Offer>,
    unknown: &mut Vec<String>,
    warnings: &mut Vec<Warning>,
) {
    let layer = match name {
        _ if name.starts_with("CAROLE_") => Layer::Carole,
        _ if name.starts_with("HOROVOD_") => Layer::Horovod,
        _ => return,
    };
    let by_field = layer == Layer::Carole && !KNOBS.iter().any(|knob| knob.name == name);
    let offer = if by_field { None } else { named_offer(name, text, layer, name).ok() };
    if let Some(offer) = offer {
        offers.push(offer);
    } else if layer == Layer::Carole {
        // Test harnesses pass their own variables to ranks under this prefix.
        if !name.starts_with("CAROLE_TEST_") {
            unknown.push(name.to_string());
        }
    } else if let Some((_, Some(note))) = horovod::WITHOUT_EFFECT.iter().find(|(known, _)| *known == name)
        && !matches!(text, "0" | "false" | "False")
    {
        warnings.push(Warning { message: format!("{name} has no effect: {note}") });
    }
}

/// torchrun's variables count only together, and only when nothing of ours says who this process is: RANK
/// alone may mean anything.
fn offer_torchrun(environment: &[(String, String)], offers: &mut Vec<Offer>) {
    let value = |name: &str| environment.iter().find(|(known, _)| known == name).map(|(_, text)| text);
    let identity = ["CAROLE_RANK", "CAROLE_SIZE"].map(|name| find_knob(name).expect("a knob of the table"));
    if offers.iter().any(|offer| identity.contains(&offer.knob)) {
        return;
    }
    if ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"].iter().any(|name| value(name).is_none()) {
        return;
    }
    let names = [
        ("CAROLE_RANK", "RANK"),
        ("CAROLE_SIZE", "WORLD_SIZE"),
        ("CAROLE_LOCAL_RANK", "LOCAL_RANK"),
        ("CAROLE_LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    ];
    for (ours, theirs) in names {
        if let Some(text) = value(theirs) {
            offers.extend(named_offer(ours, text, Layer::Torchrun, theirs));
        }
    }
}

fn bad_value(knob: &Knob, offer: &Offer, why: &str) -> Error {
    let shown: String = offer.text.chars().take(200).collect();
    let place = if offer.origin.name == knob.name || offer.origin.name == knob.field {
        knob.name.to_string()
    } else {
        format!("{} (which sets {})", offer.origin.name, knob.name)
    };
    Error::usage(format!("{place} cannot be '{shown}': {why}; allowed: {}", (knob.allowed)()))
}

/// Names the variable and the nearest one that exists, never its value, which may be a secret.
fn unknown_variable(name: &str) -> String {
    let nearest = KNOBS.iter().map(|knob| (edit_distance(name, knob.name), knob.name)).min();
    let (distance, known) = nearest.expect("the table is not empty");
    let shown: String = name.chars().take(200).collect();
    if distance <= name.len() / 3 {
        format!("{shown} is not a setting of Carole; did you mean {known}?")
    } else {
        format!(
            "{shown} is not a setting of Carole (the nearest is {known}); carolerun --print-config lists them all"
        )
    }
}

/// Letters to insert, delete or replace to make `b` of `a` (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    // A long unknown name is not near to anything; the work stays bounded.
    let a: Vec<char> = a.chars().take(100).collect();
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, letter) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for j in 0..a.len() {
            let replaced = diagonal + usize::from(a[j] != letter);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[a.len()]
}
