//! The configuration file: `name = value` lines, or the two levels of `horovodrun`'s YAML.

use super::horovod::{self, Convert};
use super::{KNOBS, Layer, Offer, Origin, Warning, find_knob, named_offer};
use crate::error::{Error, Result};
use std::io::Read;
use std::path::Path;

/// A file of knobs is small; a path that leads to something else (a device, a dataset) is a mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// One value of the file.
pub(super) struct Entry {
    /// `name`, or `section.name`.
    key: String,
    text: String,
    line: usize,
}

/// What an entry of horovodrun's YAML sets: a variable, or nothing with a reason that is said once.
enum Meaning {
    Sets(&'static str, Convert),
    WithoutEffect,
}

/// horovodrun's YAML, key by key.
const YAML: &[(&str, Meaning)] = &[
    ("params.fusion_threshold_mb", Meaning::Sets("CAROLE_FUSION_BYTES", horovod::mebibytes_to_bytes)),
    ("params.cycle_time_ms", Meaning::Sets("CAROLE_BATCH_WINDOW_US", horovod::milliseconds_to_us)),
    ("params.cache_capacity", Meaning::Sets("CAROLE_CACHE_CAPACITY", horovod::as_is)),
    ("params.hierarchical_allreduce", Meaning::WithoutEffect),
    ("params.hierarchical_allgather", Meaning::WithoutEffect),
    ("params.torus_allreduce", Meaning::WithoutEffect),
    ("stall_check.enabled", Meaning::Sets("CAROLE_STALL_WARN_S", horovod::zero_when_off)),
    ("stall_check.warning_time_seconds", Meaning::Sets("CAROLE_STALL_WARN_S", horovod::as_is)),
    ("stall_check.shutdown_time_seconds", Meaning::Sets("CAROLE_STALL_FAIL_S", horovod::as_is)),
    ("library_options.thread_affinity", Meaning::Sets("CAROLE_THREAD_AFFINITY", horovod::as_is)),
    ("library_options.gloo_timeout_seconds", Meaning::Sets("CAROLE_START_TIMEOUT_S", horovod::as_is)),
    ("library_options.mpi_threads_disable", Meaning::Sets("CAROLE_MPI_THREADS_DISABLE", horovod::as_is)),
    ("library_options.num_nccl_streams", Meaning::WithoutEffect),
    ("logging.level", Meaning::Sets("CAROLE_LOG_LEVEL", horovod::as_is)),
    ("logging.with_timestamp", Meaning::Sets("CAROLE_LOG_TIMESTAMPS", horovod::as_is)),
    ("autotune.enabled", Meaning::WithoutEffect),
    ("autotune.log_file", Meaning::WithoutEffect),
    ("autotune.warmup_samples", Meaning::WithoutEffect),
    ("autotune.steps_per_sample", Meaning::WithoutEffect),
    ("autotune.bayes_opt_max_samples", Meaning::WithoutEffect),
    ("autotune.gaussian_process_noise", Meaning::WithoutEffect),
    ("timeline.filename", Meaning::WithoutEffect),
    ("timeline.mark_cycles", Meaning::WithoutEffect),
    ("controller", Meaning::WithoutEffect),
];

/// Reads and parses the file.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>> {
    let failed = |why: String| {
        Error::usage(format!("the configuration file '{}' cannot be read: {why}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|e| failed(e.to_string()))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(failed(format!("it is longer than {FILE_BYTES_MAX} bytes")));
    }
    parse(&text).map_err(|(line, column, why)| failed(format!("line {line}, column {column}: {why}")))
}

/// Parses the text; the error carries the numbers of the line and the column, from 1.
pub(super) fn parse(text: &str) -> std::result::Result<Vec<Entry>, (usize, usize, String)> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut section: Option<String> = None;
    for (index, raw) in text.lines().enumerate() {
        let line = index + 1;
        let content = without_comment(raw);
        if content.trim().is_empty() || content.trim() == "---" {
            continue;
        }
        let indented = content.starts_with([' ', '\t']);
        // Columns count characters, as editors do.
        let bad = |at: usize, why: &str| (line, 1 + content[..at].chars().count(), why.to_string());
        let start = content.len() - content.trim_start().len();
        let end = content.trim_end().len();
        let split = content.find(['=', ':']).ok_or_else(|| {
            bad(
                end,
                "neither 'name = value' nor 'name: value' nor a section 'name:'; a '=' or ':' is missing",
            )
        })?;
        let name = content[..split].trim();
        if name.is_empty() {
            return Err(bad(start, "it does not begin with a name"));
        }
        if let Some(space) = name.find(char::is_whitespace) {
            return Err(bad(start + space, "a name has no spaces in it"));
        }
        let text = content[split + 1..].trim();
        let at = split + 1 + (content[split + 1..].len() - content[split + 1..].trim_start().len());
        if let Some(open @ ('[' | '{' | '&' | '*' | '|' | '>')) = text.chars().next() {
            return Err(bad(
                at,
                &format!("'{open}' begins something that no setting takes; write a plain value"),
            ));
        }
        if let Some(quote) = text.chars().next().filter(|c| matches!(c, '"' | '\''))
            && (text.len() < 2 || !text.ends_with(quote))
        {
            return Err(bad(at, &format!("the quotation mark {quote} is not closed")));
        }
        let value = unquoted(text);
        if !indented {
            section = None;
        }
        if value.is_empty() && content.as_bytes()[split] == b':' && !indented {
            section = Some(name.to_string());
            continue;
        }
        let key = match &section {
            Some(section) => format!("{section}.{name}"),
            None => name.to_string(),
        };
        if entries.iter().any(|entry| entry.key == key) {
            return Err(bad(start, &format!("'{key}' is set twice")));
        }
        entries.push(Entry { key, text: value.to_string(), line });
    }
    Ok(entries)
}

/// Drops a comment: `#` at the beginning or after a space, outside quotes.
fn without_comment(line: &str) -> &str {
    let mut quote = None;
    let mut previous = ' ';
    for (at, letter) in line.char_indices() {
        match (quote, letter) {
            (None, '#') if previous.is_whitespace() => return &line[..at],
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), _) if open == letter => quote = None,
            _ => {}
        }
        previous = letter;
    }
    line
}

fn unquoted(text: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return inner;
        }
    }
    text
}

impl Entry {
    /// What this entry offers, or an error that names the file, the line and the nearest known key.
    pub(super) fn offer(&self, path: &Path, warnings: &mut Vec<Warning>) -> Result<Option<Offer>> {
        let place = format!("{}:{}", path.display(), self.line);
        if self.text.is_empty() || self.text == "null" || self.text == "~" {
            return Ok(None);
        }
        if let Some((_, meaning)) = YAML.iter().find(|(key, _)| *key == self.key) {
            match meaning {
                Meaning::Sets(variable, convert) => {
                    let knob = find_knob(variable).expect("the YAML table names knobs");
                    let origin = Origin { layer: Layer::File, name: place };
                    // "enabled: false" goes before a warning time in the same file.
                    let order = usize::from(!self.key.ends_with(".enabled"));
                    return Ok(Some(Offer {
                        knob,
                        origin,
                        text: self.text.clone(),
                        convert: *convert,
                        order,
                    }));
                }
                Meaning::WithoutEffect => {
                    if !matches!(self.text.to_ascii_lowercase().as_str(), "0" | "false" | "no" | "off") {
                        let message = format!("{place}: '{}' has no effect in this version", self.key);
                        warnings.push(Warning { message });
                    }
                    return Ok(None);
                }
            }
        }
        match named_offer(&self.key, &self.text, Layer::File, &place) {
            Ok(offer) => Ok(Some(offer)),
            Err(_) => Err(Error::usage(format!(
                "{place}: there is no setting '{}'; the nearest is '{}'",
                self.key,
                nearest(&self.key)
            ))),
        }
    }
}

fn nearest(key: &str) -> &'static str {
    let known = YAML.iter().map(|(key, _)| *key).chain(KNOBS.iter().map(|knob| knob.field));
    known.min_by_key(|name| super::edit_distance(key, name)).expect("the tables are not empty")
}
