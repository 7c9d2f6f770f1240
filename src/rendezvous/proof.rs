//! How two processes prove to each other that they belong together, before any other byte is believed. The
//! same handshake opens every connection. It has no socket and no clock.
//!
//! ```text
//! connector -> acceptor   prefix, hello of the connector (job, epoch, rank, purpose, nonce)
//! acceptor  -> connector  prefix, hello of the acceptor
//! connector -> acceptor   HMAC(secret, "connector", both hellos)
//! acceptor  -> connector  HMAC(secret, "acceptor", both hellos)
//! ```
//! The nonces make a replay worthless, the role in the HMAC a reflection, and the hellos under the HMAC bind
//! the connection to (job, epoch, rank, peer, purpose). The acceptor is silent until a well-formed hello has
//! come, so a port scan learns nothing; whoever fails is closed without a word.
//!
//! *Architecture invariant:* a side reads exactly the bytes that the handshake wants, so what follows it
//! belongs to the next protocol untouched.
#![forbid(unsafe_code)]

use super::codec::{Malformed, Reader, Writer};
use super::secret::{JobId, Secret};
use crate::limits::HANDSHAKE_BYTES_MAX;
use crate::types::{Epoch, Rank};
use crate::wire::PROTOCOL;
use std::fmt;

/// The rank that the rendezvous service goes by.
pub const SERVICE: Rank = Rank(u32::MAX);
/// Bytes of a build's name in a hello.
pub const BUILD_BYTES_MAX: usize = 128;

const MAGIC: [u8; 8] = *b"\x93carole\n";
/// Magic, protocol, length of the hello. This, and the build at the head of the hello, is the same in every
/// version, so that a mismatch can name both.
const PREFIX_BYTES: usize = 16;
const PROOF_BYTES: usize = 32;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    /// To register with the rendezvous service.
    Register,
    /// To meet again after an epoch. Whoever asks has the numbers of that epoch, which mean nothing in a later one, so
    /// the acceptor takes over whom it was looking for; what is registered then must be of the same rank and epoch.
    Regroup,
    /// To ask the peer to connect.
    Knock,
    /// The control lane of a TCP link.
    Control,
    /// A payload lane of a TCP link.
    Lane(u8),
    /// A shared-memory link.
    Shm,
}

/// What a side says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The build, for messages about versions.
    pub build: String,
    /// The job.
    pub job: JobId,
    /// The epoch.
    pub epoch: Epoch,
    /// Who speaks.
    pub rank: Rank,
    /// Who is meant.
    pub peer: Rank,
    /// What for.
    pub purpose: Purpose,
    /// Which attempt at a link this connection belongs to; counts up per pair of ranks.
    pub link: u64,
    /// The speaker takes encrypted connections only, and this one is not.
    pub refuses_clear: bool,
    /// Never used twice.
    pub nonce: [u8; 32],
}

impl Hello {
    /// What this process says when it connects.
    pub fn new(
        secret: &Secret,
        epoch: Epoch,
        (rank, peer): (Rank, Rank),
        purpose: Purpose,
        link: u64,
    ) -> Result<Hello, getrandom::Error> {
        Ok(Hello {
            build: super::build().to_owned(),
            job: secret.job(),
            epoch,
            rank,
            peer,
            purpose,
            link,
            refuses_clear: false,
            nonce: nonce()?,
        })
    }
}

/// Why a handshake failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProofError {
    /// The peer does not speak this protocol at all.
    NotCarole,
    /// The peer speaks another version of it.
    Version {
        /// Its protocol.
        theirs: u32,
        /// Its build.
        build: String,
    },
    /// The bytes are not a hello.
    Malformed(&'static str),
    /// The peer belongs to another job.
    OtherJob,
    /// The peer is in another epoch.
    WrongEpoch {
        /// The epoch here.
        ours: Epoch,
        /// The epoch there.
        theirs: Epoch,
    },
    /// Another rank than the one expected is there.
    WrongRank {
        /// Who was expected, if it was one rank.
        expected: Option<Rank>,
        /// Who it says it is.
        claimed: Rank,
    },
    /// The peer looked for another rank than this one.
    WrongPeer {
        /// Whom it looked for.
        sought: Rank,
    },
    /// The connection is for something that is not served here.
    WrongPurpose(Purpose),
    /// The peer named the right job but could not prove the secret.
    WrongSecret,
    /// One side takes encrypted connections only, and the other does not encrypt.
    Clear,
    /// The peer closed the connection before it had proven itself to TLS.
    ClosedAtTls,
    /// The peer closed the connection before it had proven itself.
    Closed,
}

impl fmt::Display for ProofError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProofError::NotCarole => f.write_str("what answers there is not Carole"),
            ProofError::Version { theirs, build } => write!(
                f,
                "protocol versions differ: this process speaks version {PROTOCOL} ({}), the peer version {theirs} \
                 ({build}); install the same version of Carole everywhere",
                super::build()
            ),
            ProofError::Malformed(why) => write!(f, "its hello is malformed: {why}"),
            ProofError::OtherJob => {
                f.write_str("it belongs to another job (its secret differs from the one of this process)")
            }
            ProofError::WrongEpoch { ours, theirs } => {
                write!(f, "it is in epoch {}, this process in epoch {}", theirs.0, ours.0)
            }
            ProofError::WrongRank { expected: Some(expected), claimed } => {
                write!(f, "{} is there instead of {}", Who(*claimed), Who(*expected))
            }
            ProofError::WrongRank { expected: None, claimed } => {
                write!(f, "it claims to be {}, which is not a peer here", Who(*claimed))
            }
            ProofError::WrongPeer { sought } => write!(f, "it was looking for {}", Who(*sought)),
            ProofError::WrongPurpose(purpose) => write!(f, "it came for {purpose:?}, which is not served here"),
            ProofError::WrongSecret => f.write_str("it could not prove the job's secret"),
            ProofError::Clear => f.write_str(
                "one of the two takes encrypted connections only and the other does not encrypt; set CAROLE_ENCRYPT=1 \
                 (or carolerun --encrypt) for all ranks or for none",
            ),
            ProofError::ClosedAtTls => f.write_str(
                "it closed the encrypted connection before proving itself (it does not encrypt, in which case \
                 CAROLE_ENCRYPT=1 or carolerun --encrypt is to be set for all ranks or for none; or it is overrun, or ended)",
            ),
            ProofError::Closed => f.write_str(
                "it closed the connection before proving itself (it refused this process, is overrun, or ended)",
            ),
        }
    }
}

struct Who(Rank);

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == SERVICE { f.write_str("the rendezvous service") } else { self.0.fmt(f) }
    }
}

impl From<Malformed> for ProofError {
    fn from(malformed: Malformed) -> ProofError {
        ProofError::Malformed(malformed.0)
    }
}

/// Which connectors an acceptor takes.
#[derive(Clone, Debug)]
pub struct Accept {
    /// Who we are.
    pub me: Rank,
    /// Ranks below this may come.
    pub size: u32,
    /// The epoch that they must be in; `None` takes any.
    pub epoch: Option<Epoch>,
    /// Whether this purpose is served.
    pub serves: fn(Purpose) -> bool,
}

enum Side {
    Connector,
    Acceptor(Accept),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Prefix,
    Hello { protocol: u32, len: usize },
    Proof,
    Done,
    Failed,
}

/// One side of a handshake in progress.
pub struct Handshake {
    secret: Secret,
    side: Side,
    stage: Stage,
    ours: Option<Hello>,
    ours_raw: Vec<u8>,
    theirs: Option<Hello>,
    theirs_raw: Vec<u8>,
    output: Vec<u8>,
    refuses_clear: bool,
}

impl Handshake {
    /// The side that connects, which knows whom it wants.
    #[must_use]
    pub fn connector(secret: &Secret, hello: Hello) -> Handshake {
        let raw = encode(&hello);
        Handshake {
            secret: secret.clone(),
            side: Side::Connector,
            stage: Stage::Prefix,
            output: raw.clone(),
            refuses_clear: false,
            ours: Some(hello),
            ours_raw: raw,
            theirs: None,
            theirs_raw: Vec::new(),
        }
    }

    /// The side that accepts, which learns who came.
    #[must_use]
    pub fn acceptor(secret: &Secret, accept: Accept) -> Handshake {
        Handshake {
            secret: secret.clone(),
            side: Side::Acceptor(accept),
            stage: Stage::Prefix,
            ours: None,
            ours_raw: Vec::new(),
            theirs: None,
            theirs_raw: Vec::new(),
            output: Vec::new(),
            refuses_clear: false,
        }
    }

    /// What the sides prove to hold.
    #[must_use]
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Whether this side has connected.
    #[must_use]
    pub fn is_connector(&self) -> bool {
        matches!(self.side, Side::Connector)
    }

    /// The connection is not encrypted and has to be: the peer is told so, and not taken.
    pub fn refuse_clear(&mut self) {
        self.refuses_clear = true;
    }

    /// How many bytes it wants next; 0 when it has ended.
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.stage {
            Stage::Prefix => PREFIX_BYTES,
            Stage::Hello { len, .. } => len,
            Stage::Proof => PROOF_BYTES,
            Stage::Done | Stage::Failed => 0,
        }
    }

    /// What is to be sent. Also after a failure: our hello, so that both sides can name both versions.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The peer, once it has proven itself (and, for a connector, knows that we have).
    #[must_use]
    pub fn proven(&self) -> Option<&Hello> {
        if self.stage == Stage::Done { self.theirs.as_ref() } else { None }
    }

    /// Whether the peer has shown a well-formed hello: it is slow rather than silent.
    #[must_use]
    pub fn greeted(&self) -> bool {
        self.theirs.is_some()
    }

    /// Whether what came began as ours does, in any version.
    #[must_use]
    pub fn heard_prefix(&self) -> bool {
        !self.theirs_raw.is_empty()
    }

    /// Takes exactly the bytes that it wanted.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), ProofError> {
        assert_eq!(bytes.len(), self.wants(), "a handshake is fed what it wants");
        let result = match self.stage {
            Stage::Prefix => self.prefix(bytes),
            Stage::Hello { protocol, .. } => self.hello(protocol, bytes),
            Stage::Proof => self.proof(bytes),
            Stage::Done | Stage::Failed => Ok(()),
        };
        if result.is_err() {
            self.stage = Stage::Failed;
        }
        result
    }

    fn prefix(&mut self, bytes: &[u8]) -> Result<(), ProofError> {
        let mut reader = Reader(bytes);
        if reader.array::<8>()? != MAGIC {
            return Err(ProofError::NotCarole);
        }
        let protocol = reader.word()?;
        let len = reader.word()? as usize;
        if len == 0 || len > HANDSHAKE_BYTES_MAX - PREFIX_BYTES {
            return Err(ProofError::Malformed("its length is out of bounds"));
        }
        self.theirs_raw.extend_from_slice(bytes);
        self.stage = Stage::Hello { protocol, len };
        Ok(())
    }

    fn hello(&mut self, protocol: u32, bytes: &[u8]) -> Result<(), ProofError> {
        self.theirs_raw.extend_from_slice(bytes);
        if protocol != PROTOCOL {
            let build = Reader(bytes).text(BUILD_BYTES_MAX).unwrap_or_else(|_| "unknown build".into());
            let build = build.chars().filter(|c| !c.is_control()).collect();
            self.answer_hello(None)?;
            return Err(ProofError::Version { theirs: protocol, build });
        }
        let theirs = decode(bytes)?;
        self.answer_hello(Some(&theirs))?;
        self.check(&theirs)?;
        self.theirs = Some(theirs);
        self.stage = Stage::Proof;
        if matches!(self.side, Side::Connector) {
            self.output = self.secret.mac(&[b"connector", &self.ours_raw, &self.theirs_raw]).to_vec();
        }
        Ok(())
    }

    /// An acceptor says who it is only now, in answer to a well-formed hello.
    fn answer_hello(&mut self, theirs: Option<&Hello>) -> Result<(), ProofError> {
        let Side::Acceptor(accept) = &self.side else { return Ok(()) };
        let of_before = theirs.filter(|t| t.purpose == Purpose::Regroup);
        let ours = Hello {
            build: super::build().to_owned(),
            job: self.secret.job(),
            epoch: match of_before {
                Some(theirs) => theirs.epoch,
                None => accept.epoch.or(theirs.map(|t| t.epoch)).unwrap_or_default(),
            },
            rank: of_before.map_or(accept.me, |theirs| theirs.peer),
            peer: theirs.map_or(SERVICE, |t| t.rank),
            purpose: theirs.map_or(Purpose::Register, |t| t.purpose),
            link: theirs.map_or(0, |t| t.link),
            refuses_clear: self.refuses_clear,
            nonce: nonce().map_err(|_| ProofError::Malformed("no nonce: the kernel gave no random bytes"))?,
        };
        self.ours_raw = encode(&ours);
        self.output = self.ours_raw.clone();
        self.ours = Some(ours);
        Ok(())
    }

    fn check(&self, theirs: &Hello) -> Result<(), ProofError> {
        let ours = self.ours.as_ref().expect("our hello is made before theirs is checked");
        if theirs.job != ours.job {
            return Err(ProofError::OtherJob);
        }
        if theirs.refuses_clear || ours.refuses_clear {
            return Err(ProofError::Clear);
        }
        if theirs.epoch != ours.epoch {
            return Err(ProofError::WrongEpoch { ours: ours.epoch, theirs: theirs.epoch });
        }
        match &self.side {
            Side::Connector if theirs.rank != ours.peer => {
                return Err(ProofError::WrongRank { expected: Some(ours.peer), claimed: theirs.rank });
            }
            Side::Acceptor(accept)
                if theirs.purpose != Purpose::Regroup
                    && (theirs.rank.0 >= accept.size || theirs.rank == accept.me) =>
            {
                return Err(ProofError::WrongRank { expected: None, claimed: theirs.rank });
            }
            Side::Acceptor(accept) if !(accept.serves)(theirs.purpose) => {
                return Err(ProofError::WrongPurpose(theirs.purpose));
            }
            _ => {}
        }
        if theirs.peer != ours.rank {
            return Err(ProofError::WrongPeer { sought: theirs.peer });
        }
        if theirs.purpose != ours.purpose || theirs.link != ours.link {
            return Err(ProofError::WrongPurpose(theirs.purpose));
        }
        if theirs.nonce == ours.nonce {
            return Err(ProofError::Malformed("it repeats our nonce"));
        }
        Ok(())
    }

    fn proof(&mut self, bytes: &[u8]) -> Result<(), ProofError> {
        let (ours, theirs) = (&self.ours_raw, &self.theirs_raw);
        let proven = match self.side {
            Side::Connector => self.secret.verify(&[b"acceptor", ours, theirs], bytes),
            Side::Acceptor(_) => self.secret.verify(&[b"connector", theirs, ours], bytes),
        };
        if !proven {
            return Err(ProofError::WrongSecret);
        }
        if matches!(self.side, Side::Acceptor(_)) {
            self.output = self.secret.mac(&[b"acceptor", theirs, ours]).to_vec();
        }
        self.stage = Stage::Done;
        Ok(())
    }
}

/// Bytes that are never used twice.
fn nonce() -> Result<[u8; 32], getrandom::Error> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce)?;
    Ok(nonce)
}

fn encode(hello: &Hello) -> Vec<u8> {
    let mut body = Writer::default();
    let (purpose, lane) = match hello.purpose {
        Purpose::Register => (0, 0),
        Purpose::Knock => (1, 0),
        Purpose::Control => (2, 0),
        Purpose::Lane(lane) => (3, lane),
        Purpose::Shm => (4, 0),
        Purpose::Regroup => (5, 0),
    };
    body.text(&hello.build, BUILD_BYTES_MAX)
        .raw(&hello.job.0)
        .word(hello.epoch.0)
        .word(hello.rank.0)
        .word(hello.peer.0)
        .byte(purpose)
        .byte(lane)
        .long(hello.link)
        .byte(u8::from(hello.refuses_clear))
        .raw(&hello.nonce);
    let mut message = Writer::default();
    message.raw(&MAGIC).word(PROTOCOL).word(body.0.len() as u32).raw(&body.0);
    assert!(message.0.len() <= HANDSHAKE_BYTES_MAX, "our own hello is bounded");
    message.0
}

fn decode(bytes: &[u8]) -> Result<Hello, Malformed> {
    let mut reader = Reader(bytes);
    let build = reader.text(BUILD_BYTES_MAX)?;
    if build.chars().any(char::is_control) {
        return Err(Malformed("the build has control characters"));
    }
    let job = JobId(reader.array()?);
    let epoch = Epoch(reader.word()?);
    let rank = Rank(reader.word()?);
    let peer = Rank(reader.word()?);
    let purpose = match (reader.byte()?, reader.byte()?) {
        (0, 0) => Purpose::Register,
        (1, 0) => Purpose::Knock,
        (2, 0) => Purpose::Control,
        (3, lane) => Purpose::Lane(lane),
        (4, 0) => Purpose::Shm,
        (5, 0) => Purpose::Regroup,
        _ => return Err(Malformed("its purpose is unknown")),
    };
    let link = reader.long()?;
    let refuses_clear = match reader.byte()? {
        0 => false,
        1 => true,
        _ => return Err(Malformed("what it says of encryption is unknown")),
    };
    let nonce = reader.array()?;
    reader.end()?;
    Ok(Hello { build, job, epoch, rank, peer, purpose, link, refuses_clear, nonce })
}

#[cfg(test)]
#[path = "proof_tests.rs"]
mod tests;
