//! Encryption of a stream socket: TLS 1.3, by rustls. The session has no socket of its own; who owns one lends it.
//!
//! Both sides hold the job's secret, and with it the job's key pair (Ed25519), which is derived from it: each proves that
//! it has the private key, and takes no other public key than its own. So there are no certificates, names or
//! clocks: keys are shown raw (RFC 7250). Nothing of a session is kept for a later one, and keys of sessions come from a
//! Diffie-Hellman exchange, so that who gets the secret later cannot read what was recorded (RFC 8446, appendix E.1).
//!
//! Who is there, with which rank and epoch, is then proven by the handshake that opens every connection
//! (`rendezvous/proof.rs`), inside.
//!
//! *Architecture invariant:* the alert by which TLS ends a stream is not sent, and the end of the stream is
//! the end of the connection, as without encryption: links have goodbyes of their own.
#![forbid(unsafe_code)]

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName,
    Error, ServerConfig, ServerConnection, SignatureScheme,
};
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

/// Bytes that a job's key is derived from.
pub const SEED_BYTES: usize = 32;
/// What the first byte of a connection is that begins with TLS: a record of the handshake (RFC 8446, section 5.1).
pub const FIRST_BYTE: u8 = 0x16;
/// What is read from the socket at once when the peer has proven itself, and before.
const READ_BYTES: usize = 64 << 10;
const HANDSHAKE_READ_BYTES: usize = 4 << 10;
/// What is encrypted before the socket has taken it. With more the allocator would give pages back and take them anew.
const PENDING_BYTES_MAX: usize = 64 << 10;
/// An Ed25519 private key in PKCS #8, up to the key itself (RFC 8410, section 7).
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, SEED_BYTES as u8];
/// TLS wants a name of the server, which is neither sent nor looked at.
const NAME: &str = "carole.invalid";

/// A job's key, ready for both sides. Clones share it.
#[derive(Clone)]
pub struct TlsKey {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsKey(..)")
    }
}

impl TlsKey {
    /// The key that these bytes stand for.
    #[must_use]
    pub fn derive(seed: &[u8; SEED_BYTES]) -> TlsKey {
        // What can fail here fails for every seed or for none, so that a test of one is a test of all.
        let mut der = [&PKCS8_PREFIX[..], seed].concat();
        let signer = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&der[..]));
        der.fill(0);
        std::hint::black_box(&mut der);
        let signer = signer.expect("every seed is a key of Ed25519");
        let public = signer.public_key().expect("the algorithm is known").into_owned();
        let certified = CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], signer);
        let certified = Arc::new(certified);
        let provider = Arc::new(provider());
        let only = Arc::new(OnlyKey { public, provider: Arc::clone(&provider) });
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&only) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(
                &certified,
            ))));
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3")
            .with_client_cert_verifier(only)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified)));
        server.send_tls13_tickets = 0;
        TlsKey { client: Arc::new(client), server: Arc::new(server) }
    }
}

/// AES with 128 bits first, which processors have instructions for.
fn provider() -> CryptoProvider {
    use ring::cipher_suite::*;
    let cipher_suites =
        vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

/// Takes the job's public key and no other.
#[derive(Debug)]
struct OnlyKey {
    public: SubjectPublicKeyInfoDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl OnlyKey {
    fn check(&self, shown: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        match shown[..] == self.public[..] && others.is_empty() {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(&shown[..]);
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, signature, algorithms)
    }
}

/// What both verifiers have in common: the key proves itself by a signature of TLS 1.3, and is shown raw.
macro_rules! proves_only_key {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _shown: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            shown: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.check_signature(message, shown, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for OnlyKey {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(shown, others).map(|()| ServerCertVerified::assertion())
    }

    proves_only_key!();
}

impl ClientCertVerifier for OnlyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(shown, others).map(|()| ClientCertVerified::assertion())
    }

    proves_only_key!();
}

/// One side of an encrypted connection, over a nonblocking socket that is lent to it. Bytes may be written from the
/// beginning: they wait until the peer has proven that it has the key.
pub struct Tls {
    connection: Connection,
    /// What was read from the socket and not looked at yet.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// Decrypted bytes that nobody has read yet.
    decrypted: usize,
    /// Why nothing more can be read.
    failed: Option<Error>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("proven", &!self.connection.is_handshaking()).finish_non_exhaustive()
    }
}

impl Tls {
    /// The side that connects, and speaks first.
    pub fn connector(key: &TlsKey) -> io::Result<Tls> {
        let name = ServerName::try_from(NAME).expect("it is a name");
        Tls::over(ClientConnection::new(Arc::clone(&key.client), name).map(Connection::Client))
    }

    /// The side that accepts.
    pub fn acceptor(key: &TlsKey) -> io::Result<Tls> {
        Tls::over(ServerConnection::new(Arc::clone(&key.server)).map(Connection::Server))
    }

    fn over(connection: Result<Connection, Error>) -> io::Result<Tls> {
        let mut connection = connection.map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(PENDING_BYTES_MAX));
        Ok(Tls { connection, incoming: Vec::new(), start: 0, end: 0, decrypted: 0, failed: None })
    }

    /// Reads bytes that have arrived, as a nonblocking socket does: 0 is the end of the stream, and
    /// `WouldBlock` that there are none. Bytes that are not the peer's, or a peer without the key, are `InvalidData`.
    pub fn read(&mut self, socket: impl AsFd, dst: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(dst) {
                Ok(n) => {
                    // What was decrypted along with something wrong was not counted.
                    self.decrypted = self.decrypted.saturating_sub(n);
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(e) => return Err(e),
            }
            if let Some(error) = &self.failed {
                return Err(io::Error::new(io::ErrorKind::InvalidData, error.clone()));
            }
            if self.start == self.end && self.receive(&socket)? == 0 {
                return Ok(0);
            }
            self.start += self.connection.read_tls(&mut &self.incoming[self.start..self.end])?;
            match self.connection.process_new_packets() {
                Ok(state) => self.decrypted = state.plaintext_bytes_to_read(),
                Err(error) => {
                    // The peer is told why, if there is room for it. What came before may still be read.
                    let _ = self.flush(&socket);
                    self.failed = Some(error);
                    continue;
                }
            }
            // What the protocol itself has to say.
            self.flush(&socket)?;
        }
    }

    fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let room = if self.connection.is_handshaking() { HANDSHAKE_READ_BYTES } else { READ_BYTES };
        self.incoming.resize(room, 0);
        loop {
            match rustix::net::recv(&socket, &mut self.incoming[..], RecvFlags::DONTWAIT) {
                Ok((_, n)) => {
                    (self.start, self.end) = (0, n);
                    return Ok(n);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Takes bytes and says how many; 0 means that the socket is full. What it took and the socket did not
    /// waits for [`Tls::flush`].
    pub fn write(&mut self, socket: impl AsFd, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush(&socket)?;
        // The first part that is not all taken, and what of it is.
        let (mut at, mut of_part, mut taken) = (0, 0, 0);
        while at < parts.len() && !self.wants_write() {
            let n = match of_part {
                // Small parts share a record.
                0 => self.connection.writer().write_vectored(&parts[at..])?,
                _ => self.connection.writer().write(&parts[at][of_part..])?,
            };
            if n == 0 {
                break;
            }
            self.flush(&socket)?;
            taken += n;
            of_part += n;
            while at < parts.len() && of_part >= parts[at].len() {
                of_part -= parts[at].len();
                at += 1;
            }
        }
        Ok(taken)
    }

    /// Hands the socket as much of what waits as it takes.
    pub fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        while self.wants_write() {
            match self.connection.write_tls(&mut Out(&socket)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether the peer has proven that it has the key.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// Whether something waits for room in the socket.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Whether there is something to read, bytes or an error, that the socket does not show any more.
    #[must_use]
    pub fn is_ahead(&self) -> bool {
        self.decrypted > 0 || self.start < self.end || self.failed.is_some()
    }
}

/// Whether an error of [`Tls::read`] says that the peer has another key.
#[must_use]
pub fn is_other_key(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    matches!(error, Some(Error::InvalidCertificate(_)))
}

/// The socket, written to without a signal when it is closed.
struct Out<'a, S>(&'a S);

impl<S: AsFd> Write for Out<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            let mut no_control = SendAncillaryBuffer::default();
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(self.0, parts, &mut no_control, flags) {
                Err(Errno::INTR) => {}
                // Taken bytes must not be taken again, so that want of memory is want of room.
                Err(Errno::NOBUFS) => return Err(Errno::AGAIN.into()),
                sent => return Ok(sent?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
