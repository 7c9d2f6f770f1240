//! What a knob's text may be: numbers within bounds, sizes with a suffix, switches, choices, lists, paths.

use std::marker::PhantomData;
use std::path::PathBuf;

/// A way of reading and showing the value of a knob.
pub trait Kind {
    /// What the program gets.
    type Output;
    /// Reads the text that a user wrote. The error says what is wrong with it, without the text itself.
    fn parse(text: &str) -> Result<Self::Output, String>;
    /// Writes the value so that `parse` reads it again.
    fn show(value: &Self::Output) -> String;
    /// What may be written, for the manual and for errors.
    fn allowed() -> String;
}

/// A whole number between bounds, both included.
pub struct Count<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Kind for Count<MIN, MAX> {
    type Output = u64;
    fn parse(text: &str) -> Result<u64, String> {
        let value: u64 = text.parse().map_err(|_| "it is not a whole number".to_string())?;
        within(value, MIN, MAX)
    }
    fn show(value: &u64) -> String {
        value.to_string()
    }
    fn allowed() -> String {
        format!("a whole number from {MIN} to {MAX}")
    }
}

/// A whole number of 32 bits (ranks, counts of things).
pub struct Small<const MIN: u32, const MAX: u32>;

impl<const MIN: u32, const MAX: u32> Kind for Small<MIN, MAX> {
    type Output = u32;
    fn parse(text: &str) -> Result<u32, String> {
        let value: u64 = text.parse().map_err(|_| "it is not a whole number".to_string())?;
        within(value, MIN.into(), MAX.into()).map(|value| value as u32)
    }
    fn show(value: &u32) -> String {
        value.to_string()
    }
    fn allowed() -> String {
        format!("a whole number from {MIN} to {MAX}")
    }
}

/// A number of bytes; suffixes K, M, G and T (also KB, KiB and so on) are powers of 1024.
pub struct Bytes<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Kind for Bytes<MIN, MAX> {
    type Output = u64;
    fn parse(text: &str) -> Result<u64, String> {
        within(parse_bytes(text)?, MIN, MAX)
    }
    fn show(value: &u64) -> String {
        show_bytes(*value)
    }
    fn allowed() -> String {
        format!(
            "a number of bytes from {} to {}; suffixes K, M, G, T are powers of 1024",
            show_bytes(MIN),
            show_bytes(MAX)
        )
    }
}

fn within(value: u64, min: u64, max: u64) -> Result<u64, String> {
    if value < min {
        Err("it is too small".to_string())
    } else if value > max {
        Err("it is too large".to_string())
    } else {
        Ok(value)
    }
}

/// Reads `4096`, `64M`, `1GiB`, `0.5g`.
///
/// # Errors
/// When the text is not a number, has another suffix, or means more than 2^64 - 1 bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("it is not a number of bytes".to_string()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(|| "it is too large".to_string());
    }
    let value: f64 = number.parse().map_err(|_| "it is not a number of bytes".to_string())?;
    let bytes = value * (1u64 << shift) as f64;
    // Beyond 2^53 a fraction has no meaning; such numbers are written without one.
    if bytes <= (1u64 << 53) as f64 { Ok(bytes as u64) } else { Err("it is too large".to_string()) }
}

/// Writes a number of bytes with the largest suffix that divides it.
#[must_use]
pub fn show_bytes(value: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if value != 0 && value.trailing_zeros() >= shift {
            return format!("{}{suffix}", value >> shift);
        }
    }
    value.to_string()
}

/// On or off.
pub struct Switch;

impl Kind for Switch {
    type Output = bool;
    fn parse(text: &str) -> Result<bool, String> {
        match text.to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Ok(true),
            "0" | "false" | "no" | "off" => Ok(false),
            _ => Err("it is neither on nor off".to_string()),
        }
    }
    fn show(value: &bool) -> String {
        if *value { "1" } else { "0" }.to_string()
    }
    fn allowed() -> String {
        "1, true, yes, on, or 0, false, no, off".to_string()
    }
}

/// Any text that is one line.
pub struct Text;

impl Kind for Text {
    type Output = String;
    fn parse(text: &str) -> Result<String, String> {
        if text.len() > 4096 {
            return Err("it is longer than 4096 bytes".to_string());
        }
        if text.chars().any(char::is_control) {
            return Err("it contains a control character".to_string());
        }
        Ok(text.to_string())
    }
    fn show(value: &String) -> String {
        value.clone()
    }
    fn allowed() -> String {
        "a line of text".to_string()
    }
}

/// The path of a file.
pub struct FilePath;

impl Kind for FilePath {
    type Output = PathBuf;
    fn parse(text: &str) -> Result<PathBuf, String> {
        Ok(PathBuf::from(text))
    }
    fn show(value: &PathBuf) -> String {
        value.display().to_string()
    }
    fn allowed() -> String {
        "the path of a file".to_string()
    }
}

/// A value that may be missing; `auto` and `none` say so.
pub struct Maybe<K>(PhantomData<K>);

impl<K: Kind> Kind for Maybe<K> {
    type Output = Option<K::Output>;
    fn parse(text: &str) -> Result<Self::Output, String> {
        match text {
            "auto" | "none" => Ok(None),
            _ => K::parse(text).map(Some),
        }
    }
    fn show(value: &Self::Output) -> String {
        value.as_ref().map_or_else(|| "auto".to_string(), K::show)
    }
    fn allowed() -> String {
        format!("auto, or {}", K::allowed())
    }
}

/// Values separated by commas; `none` for no value.
pub struct List<K>(PhantomData<K>);

impl<K: Kind> Kind for List<K> {
    type Output = Vec<K::Output>;
    fn parse(text: &str) -> Result<Self::Output, String> {
        if text == "none" {
            return Ok(Vec::new());
        }
        text.split(',').map(|item| K::parse(item.trim())).collect()
    }
    fn show(value: &Self::Output) -> String {
        if value.is_empty() {
            return "none".to_string();
        }
        value.iter().map(K::show).collect::<Vec<_>>().join(",")
    }
    fn allowed() -> String {
        format!("a comma-separated list, each item {}", K::allowed())
    }
}

/// An enum that users choose from by name.
pub struct Choice<T>(PhantomData<T>);

/// An enum whose values have names.
pub trait Named: Sized + Copy + PartialEq + 'static {
    /// Every value with its name; a value's first name is the one that is shown.
    const NAMES: &'static [(&'static str, Self)];
    /// Words for a name that exists elsewhere but not here.
    fn refuse(_name: &str) -> Option<String> {
        None
    }
    /// The name of this value.
    fn name(self) -> &'static str {
        let row = Self::NAMES.iter().find(|(_, value)| *value == self);
        row.expect("every value of a Named enum has a name").0
    }
}

impl<T: Named> Kind for Choice<T> {
    type Output = T;
    fn parse(text: &str) -> Result<T, String> {
        let name = text.to_ascii_lowercase();
        // What this build cannot do is a choice all the same.
        if let Some(words) = T::refuse(&name) {
            return Err(words);
        }
        let found = T::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| *value).ok_or_else(|| "there is no such choice".to_string())
    }
    fn show(value: &T) -> String {
        value.name().to_string()
    }
    fn allowed() -> String {
        let mut names: Vec<&str> = Vec::new();
        for (name, value) in T::NAMES {
            if value.name() == *name {
                names.push(name);
            }
        }
        names.join(", ")
    }
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $($text:literal)|+;)* } $($refuse:item)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl Named for $name {
            const NAMES: &'static [(&'static str, Self)] = &[$($(($text, $name::$variant),)+)*];
            $($refuse)?
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(Named::name(*self))
            }
        }
    };
}

named! {
    /// Which transport carries payload between two ranks.
    TransportChoice {
        /// Shared memory within a host, TCP between hosts.
        Auto = "auto";
        /// Shared memory only; ranks on different hosts are an error.
        Shm = "shm";
        /// TCP only, also within a host.
        Tcp = "tcp";
        /// MPI only; ranks must be started by MPI's launcher.
        Mpi = "mpi";
    }
    fn refuse(name: &str) -> Option<String> {
        (name == "mpi" && !cfg!(feature = "mpi")).then(|| {
            "this build has no MPI transport; build it with the cargo feature mpi, as README.md shows".to_string()
        })
    }
}

named! {
    /// A family of algorithms, as users name it.
    AlgorithmName {
        /// Rings: the most bandwidth for large tensors.
        Ring = "ring";
        /// Pipelined binary trees.
        Tree = "tree";
        /// Recursive halving and doubling.
        Doubling = "doubling";
        /// Direct exchange: each rank sums its part of all inputs, in rank order.
        Direct = "direct";
        /// Within hosts first, then between them.
        Hierarchical = "hierarchical" | "hierarchy";
    }
}

named! {
    /// The widest vector instructions that reductions may use. All levels give the same bits.
    SimdLevel {
        /// What every processor of this architecture has.
        Baseline = "baseline";
        /// AVX2 and F16C (x86-64-v3).
        Avx2 = "avx2";
        /// AVX-512 (x86-64-v4).
        Avx512 = "avx512";
    }
}

named! {
    /// How much is logged: messages at or above this level.
    LogLevel {
        /// Everything, each message between ranks included.
        Trace = "trace";
        /// What helps to debug Carole itself.
        Debug = "debug";
        /// What a user may want to know once.
        Info = "info";
        /// What is probably wrong (the default).
        Warning = "warning" | "warn";
        /// What failed.
        Error = "error";
        /// What ends the process.
        Fatal = "fatal";
        /// Nothing at all.
        Off = "off";
    }
}
