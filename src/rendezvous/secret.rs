//! The job's secret: 32 bytes that every rank must prove to hold. It is never in argv, in a log or in an
//! error, and its memory is cleared when the last holder lets go.

use crate::error::{Error, Result};
use crate::transport::tls::TlsKey;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::fmt;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes of a secret.
pub const SECRET_BYTES: usize = 32;
/// A secret as text: two digits a byte, a line end, and some slack for careless editors.
const TEXT_BYTES_MAX: usize = 2 * SECRET_BYTES + 16;

/// The job's secret, and whether connections that it proves are encrypted. Clones share the bytes.
#[derive(Clone)]
pub struct Secret {
    shared: Arc<Shared>,
    encrypts: bool,
}

struct Shared {
    bytes: Bytes,
    tls_key: OnceLock<TlsKey>,
}

struct Bytes([u8; SECRET_BYTES]);

impl Drop for Bytes {
    fn drop(&mut self) {
        self.0.fill(0);
        // The compiler must believe that somebody looks at the zeros, or it would leave them out.
        std::hint::black_box(&mut self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Names a job without betraying its secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct JobId(pub [u8; 16]);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Secret {
    /// A secret with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Secret {
        Secret::of(Bytes(bytes))
    }

    fn of(bytes: Bytes) -> Secret {
        Secret { shared: Arc::new(Shared { bytes, tls_key: OnceLock::new() }), encrypts: false }
    }

    /// A new secret from the kernel's generator.
    pub fn mint() -> Result<Secret> {
        let mut bytes = Bytes([0; SECRET_BYTES]);
        getrandom::fill(&mut bytes.0).map_err(|e| {
            Error::usage(format!("cannot mint a job secret: the kernel gave no random bytes: {e}"))
        })?;
        Ok(Secret::of(bytes))
    }

    /// What `CAROLE_INSECURE=1` uses in place of a secret: anybody who knows `name` can compute it.
    #[must_use]
    pub fn insecure(name: &str) -> Secret {
        let mut hash = Sha256::new();
        hash.update(b"carole without a secret\0");
        hash.update(name.as_bytes());
        Secret::from_bytes(hash.finalize().into())
    }

    /// The secret written as 64 hexadecimal digits. White space around it is ignored.
    pub fn from_hex(text: &str) -> std::result::Result<Secret, &'static str> {
        let text = text.trim().as_bytes();
        if text.len() != 2 * SECRET_BYTES {
            return Err("a secret is 64 hexadecimal digits (make one with: openssl rand -hex 32)");
        }
        let mut bytes = Bytes([0; SECRET_BYTES]);
        for (byte, pair) in bytes.0.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16).ok_or("a secret has only hexadecimal digits");
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Secret::of(bytes))
    }

    /// The same secret, whose holder encrypts its connections over TCP and takes no others; or not.
    #[must_use]
    pub fn encrypting(self, encrypts: bool) -> Secret {
        Secret { encrypts, ..self }
    }

    /// Whether connections over TCP must be encrypted.
    #[must_use]
    pub fn encrypts(&self) -> bool {
        self.encrypts
    }

    /// The key that connections are encrypted with, which tells nothing about the secret.
    #[must_use]
    pub fn tls_key(&self) -> &TlsKey {
        self.shared.tls_key.get_or_init(|| TlsKey::derive(&self.mac(&[b"carole tls key"])))
    }

    /// The secret as 64 hexadecimal digits, to be written to an inherited descriptor and nowhere else.
    #[must_use]
    pub fn to_hex(&self) -> String {
        self.expose().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The bytes, to be handed to a process that has proven to be the same user's.
    #[must_use]
    pub fn expose(&self) -> &[u8; SECRET_BYTES] {
        &self.shared.bytes.0
    }

    /// The secret in a file that only its owner can read.
    pub fn from_file(path: &Path) -> Result<Secret> {
        let refuse = |why: String| Error::usage(format!("CAROLE_SECRET_FILE={}: {why}", path.display()));
        let file = std::fs::File::open(path).map_err(|e| refuse(format!("cannot be opened: {e}")))?;
        // The open file is asked, not the path, which could be exchanged between the question and the read.
        let facts = file.metadata().map_err(|e| refuse(format!("cannot be examined: {e}")))?;
        if !facts.is_file() {
            return Err(refuse("is not a regular file".into()));
        }
        let me = rustix::process::geteuid().as_raw();
        if facts.uid() != me {
            return Err(refuse(format!("belongs to user {}, not to user {me}; copy it", facts.uid())));
        }
        if facts.mode() & 0o077 != 0 {
            let mode = facts.mode() & 0o777;
            return Err(refuse(format!(
                "has mode {mode:04o}, so others can use it; run: chmod 600 {}",
                path.display()
            )));
        }
        read_hex(file).map_err(refuse)
    }

    /// The secret that the launcher left on a descriptor (`CAROLE_SECRET_FD`). It is read and closed once in a
    /// process and remembered, because init may be called again and the number may by then mean another file.
    pub fn from_descriptor(number: RawFd) -> Result<Secret> {
        static READ: Mutex<Vec<(RawFd, Secret)>> = Mutex::new(Vec::new());
        let mut read = READ.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, secret)) = read.iter().find(|(known, _)| *known == number) {
            return Ok(secret.clone());
        }
        let refuse = |why: String| {
            Error::usage(format!(
                "CAROLE_SECRET_FD={number}: {why}; carolerun sets this variable for the processes that it starts, \
                 start this program by it or unset the variable"
            ))
        };
        if number < 3 || std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            return Err(refuse("there is no such inherited descriptor".into()));
        }
        // SAFETY: the descriptor is open (just seen), and the launcher made it for this reader alone; it is
        // closed here and its number never used again.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        let secret = read_hex(FromStart { file: descriptor.into(), at: 0 }).map_err(refuse)?;
        read.push((number, secret.clone()));
        Ok(secret)
    }

    /// The name of the job whose secret this is.
    #[must_use]
    pub fn job(&self) -> JobId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.mac(&[b"carole job id"])[..16]);
        JobId(id)
    }

    /// HMAC-SHA256 under this secret over all parts, each with its length before it.
    #[must_use]
    pub fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.hash(parts).finalize().into_bytes().into()
    }

    /// Whether `mac` is what [`Secret::mac`] gives, in a time that does not depend on the bytes.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8]) -> bool {
        self.hash(parts).verify_slice(mac).is_ok()
    }

    fn hash(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut hash = Hmac::<Sha256>::new_from_slice(self.expose()).expect("HMAC takes keys of any length");
        for part in parts {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash
    }
}

/// A file read from its start, wherever others who hold the same open file have moved its position: a rank may
/// be a shell that starts one program after another.
struct FromStart {
    file: std::fs::File,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = match self.file.read_at(buffer, self.at) {
            // A pipe has no positions, and one reader.
            Err(e) if e.raw_os_error() == Some(libc::ESPIPE) => self.file.read(buffer)?,
            result => result?,
        };
        self.at += n as u64;
        Ok(n)
    }
}

fn read_hex(from: impl Read) -> std::result::Result<Secret, String> {
    let mut text = Vec::with_capacity(TEXT_BYTES_MAX);
    from.take(TEXT_BYTES_MAX as u64).read_to_end(&mut text).map_err(|e| format!("cannot be read: {e}"))?;
    let secret = match std::str::from_utf8(&text) {
        Ok(text) => Secret::from_hex(text).map_err(str::to_owned),
        Err(_) => Err("a secret has only hexadecimal digits".into()),
    };
    text.fill(0);
    std::hint::black_box(&mut text);
    secret
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::IntoRawFd;
    use std::os::unix::fs::PermissionsExt;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_file_gives_the_secret_that_was_written() {
        let minted = Secret::mint().unwrap();
        let file = file(&format!("{}\n", minted.to_hex()), 0o600);
        assert_eq!(Secret::from_file(file.path()).unwrap().expose(), minted.expose());
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let text = "00".repeat(32);
        for mode in [0o644, 0o640, 0o604, 0o620] {
            let file = file(&text, mode);
            let error = Secret::from_file(file.path()).unwrap_err().to_string();
            assert!(error.contains("chmod 600") && error.contains(&format!("{mode:04o}")), "{error}");
        }
    }

    #[test]
    fn bad_text_is_refused_and_not_repeated() {
        for text in ["", "abc", &"zz".repeat(32), &"00".repeat(31), &"00".repeat(33), "\u{e4}"] {
            let file = file(text, 0o600);
            let error = Secret::from_file(file.path()).unwrap_err().to_string();
            assert!(error.contains("hexadecimal"), "{error}");
        }
        let error = Secret::from_file(Path::new("/nonexistent/secret")).unwrap_err().to_string();
        assert!(error.contains("CAROLE_SECRET_FILE=/nonexistent/secret"), "{error}");
    }

    #[test]
    fn a_descriptor_is_read_once_closed_and_remembered() {
        let minted = Secret::mint().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        std::fs::File::from(OwnedFd::from(write)).write_all(minted.to_hex().as_bytes()).unwrap();
        let number = OwnedFd::from(read).into_raw_fd();
        assert_eq!(Secret::from_descriptor(number).unwrap().expose(), minted.expose());
        assert_eq!(Secret::from_descriptor(number).unwrap().expose(), minted.expose());
        let error = Secret::from_descriptor(900).unwrap_err().to_string();
        assert!(error.contains("CAROLE_SECRET_FD=900"), "{error}");
    }

    #[test]
    fn every_reader_of_an_inherited_descriptor_gets_the_secret() {
        let minted = Secret::mint().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(minted.to_hex().as_bytes()).unwrap();
        // Copies share the position, as those of a parent and its children do; it stands at the end.
        for _ in 0..3 {
            let number = file.try_clone().unwrap().into_raw_fd();
            assert_eq!(Secret::from_descriptor(number).unwrap().expose(), minted.expose());
        }
    }

    #[test]
    fn nothing_prints_the_secret() {
        let secret = Secret::from_bytes([0xab; 32]);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!(!secret.job().to_string().contains("abab"));
        assert_ne!(secret.job(), Secret::from_bytes([0xac; 32]).job());
    }

    #[test]
    fn parts_cannot_be_shifted_into_each_other() {
        let secret = Secret::from_bytes([1; 32]);
        assert_ne!(secret.mac(&[b"ab", b"c"]), secret.mac(&[b"a", b"bc"]));
        assert!(secret.verify(&[b"a", b"bc"], &secret.mac(&[b"a", b"bc"])));
        assert!(!secret.verify(&[b"a", b"bc"], &secret.mac(&[b"a", b"bc"])[..31]));
    }
}
