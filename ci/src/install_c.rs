//! Installs the C interface: `libcarole.so.0.x.y` with its links, `libcarole.a`, `carole.h`, `carole.pc`.
#![forbid(unsafe_code)]

use crate::{Count, Verdict};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("ci lies in the repository").to_path_buf()
}

pub fn run(prefix: &Path) -> Verdict {
    let root = repository();
    let status = Command::new("cargo")
        .args(["build", "--release", "-p", "carole-c"])
        .current_dir(&root)
        .status()
        .map_err(|e| format!("cargo does not start: {e}"))?;
    if !status.success() {
        return Err("the C interface does not build (see above)".to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    install(&root, &target.join("release"), prefix).map_err(|e| format!("cannot install: {e}"))?;
    println!("installed into {}", prefix.display());
    Ok(Count { passed: 1, skipped: 0 })
}

fn install(root: &Path, built: &Path, prefix: &Path) -> std::io::Result<()> {
    let (lib, include) = (prefix.join("lib"), prefix.join("include"));
    fs::create_dir_all(lib.join("pkgconfig"))?;
    fs::create_dir_all(&include)?;
    let versioned = format!("libcarole.so.{VERSION}");
    fs::copy(built.join("libcarole.so"), lib.join(&versioned))?;
    fs::copy(built.join("libcarole.a"), lib.join("libcarole.a"))?;
    for link in ["libcarole.so.0", "libcarole.so"] {
        let link = lib.join(link);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        std::os::unix::fs::symlink(&versioned, &link)?;
    }
    let source = root.join("bindings/c");
    fs::copy(source.join("carole.h"), include.join("carole.h"))?;
    let prefix = fs::canonicalize(prefix)?;
    let pkg_config = fs::read_to_string(source.join("carole.pc.in"))?
        .replace("@PREFIX@", &prefix.to_string_lossy())
        .replace("@VERSION@", VERSION);
    fs::write(lib.join("pkgconfig/carole.pc"), pkg_config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_is_complete_and_can_be_repeated() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let built = scratch.path().join("built");
        fs::create_dir(&built).expect("can be made");
        fs::write(built.join("libcarole.so"), b"shared").expect("can be written");
        fs::write(built.join("libcarole.a"), b"static").expect("can be written");
        let prefix = scratch.path().join("prefix");
        for _ in 0..2 {
            install(&repository(), &built, &prefix).expect("installs");
        }
        assert_eq!(
            fs::read(prefix.join("lib/libcarole.so")).expect("a link that leads somewhere"),
            b"shared"
        );
        let pkg_config = fs::read_to_string(prefix.join("lib/pkgconfig/carole.pc")).expect("installed");
        assert!(!pkg_config.contains('@') && pkg_config.contains(VERSION), "{pkg_config}");
    }
}
