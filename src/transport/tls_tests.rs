use super::*;
use crate::error::Cause;
use crate::transport::Pipe;
use crate::transport::tcp::{TcpOptions, TcpPipe};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Something that would be found again in what passes in clear.
const WORDS: &[u8] = b"gradients of layer 7, in clear; ";

struct End {
    socket: UnixStream,
    tls: Tls,
}

fn key(byte: u8) -> TlsKey {
    TlsKey::derive(&[byte; SEED_BYTES])
}

fn socket_pair() -> (UnixStream, UnixStream) {
    let pair = UnixStream::pair().unwrap();
    pair.0.set_nonblocking(true).unwrap();
    pair.1.set_nonblocking(true).unwrap();
    pair
}

/// Two ends with somebody in between, who carries the bytes: the last two are its sockets.
fn tapped(ours: &TlsKey, theirs: &TlsKey) -> (End, End, UnixStream, UnixStream) {
    let ((a, left), (b, right)) = (socket_pair(), socket_pair());
    let a = End { socket: a, tls: Tls::connector(ours).unwrap() };
    let b = End { socket: b, tls: Tls::acceptor(theirs).unwrap() };
    (a, b, left, right)
}

fn ends() -> (End, End) {
    let (a, b) = socket_pair();
    let a = End { socket: a, tls: Tls::connector(&key(1)).unwrap() };
    (a, End { socket: b, tls: Tls::acceptor(&key(1)).unwrap() })
}

impl End {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.tls.write(&self.socket, &[IoSlice::new(bytes)]).unwrap()
    }

    /// What has come; `None` where nothing has.
    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; 100_000];
        match self.tls.read(&self.socket, &mut bytes) {
            Ok(n) => Ok(Some(bytes[..n].to_vec())),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Carries what has come from one side to the other, after `change`, and gives it.
fn carry(from: &mut UnixStream, to: &mut UnixStream, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    match from.read(&mut bytes) {
        Ok(n) => bytes.truncate(n),
        Err(_) => return Vec::new(),
    }
    change(&mut bytes);
    to.write_all(&bytes).unwrap();
    bytes
}

/// Lets both ends speak until they have proven themselves, or the error of one.
fn prove(a: &mut End, b: &mut End, left: &mut UnixStream, right: &mut UnixStream) -> io::Result<()> {
    a.tls.flush(&a.socket)?;
    for _ in 0..4 {
        carry(left, right, |_| {});
        b.read()?;
        carry(right, left, |_| {});
        a.read()?;
    }
    Ok(())
}

#[test]
fn bytes_pass_both_ways_and_are_not_seen_on_the_way() {
    let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(1));
    prove(&mut a, &mut b, &mut left, &mut right).unwrap();
    let words = WORDS.repeat(100);
    assert_eq!((a.write(&words), b.write(&words)), (words.len(), words.len()));
    for tap in [carry(&mut left, &mut right, |_| {}), carry(&mut right, &mut left, |_| {})] {
        assert!(tap.len() > words.len());
        assert!(!tap.windows(8).any(|window| window == &WORDS[..8]), "the words passed in clear");
    }
    assert_eq!(b.read().unwrap().unwrap(), words);
    assert_eq!(a.read().unwrap().unwrap(), words);
    assert_eq!((a.read().unwrap(), b.read().unwrap()), (None, None));
}

#[test]
fn what_is_written_before_the_proof_waits_for_it() {
    let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(1));
    assert_eq!(a.write(WORDS), WORDS.len());
    let first = carry(&mut left, &mut right, |_| {});
    assert_eq!(first[0], FIRST_BYTE);
    assert!(!first.windows(8).any(|window| window == &WORDS[..8]));
    assert_eq!(b.read().unwrap(), None);
    carry(&mut right, &mut left, |_| {});
    assert_eq!(a.read().unwrap(), None);
    carry(&mut left, &mut right, |_| {});
    assert_eq!(b.read().unwrap().unwrap(), WORDS);
}

#[test]
fn who_has_another_key_is_refused_by_both_sides() {
    let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(2));
    a.write(WORDS);
    let error = prove(&mut a, &mut b, &mut left, &mut right).unwrap_err();
    assert!(is_other_key(&error), "the connector: {error}");
    // A connector that does not look whom it talks to is refused by the acceptor.
    let mut blind = (*key(1).client).clone();
    let only = OnlyKey { public: OnlyKey::public_of(&key(2)), provider: Arc::new(provider()) };
    blind.dangerous().set_certificate_verifier(Arc::new(only));
    let blind = TlsKey { client: Arc::new(blind), server: Arc::clone(&key(1).server) };
    let (mut a, mut b, mut left, mut right) = tapped(&blind, &key(2));
    a.write(WORDS);
    let error = prove(&mut a, &mut b, &mut left, &mut right).unwrap_err();
    assert!(is_other_key(&error), "the acceptor: {error}");
}

impl OnlyKey {
    fn public_of(key: &TlsKey) -> SubjectPublicKeyInfoDer<'static> {
        let certified =
            key.client.client_auth_cert_resolver.resolve(&[], &[SignatureScheme::ED25519]).unwrap();
        SubjectPublicKeyInfoDer::from(certified.cert[0].to_vec())
    }
}

#[test]
fn who_does_not_speak_tls_is_refused() {
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[FIRST_BYTE; 600], &[0; 64]] {
        let (mut a, mut b) = ends();
        a.socket.write_all(garbage).unwrap();
        let error = b.read().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(!is_other_key(&error), "{error}");
    }
}

#[test]
fn a_changed_bit_is_found_or_changes_nothing() {
    let words = WORDS.repeat(100);
    for at in [0, 1, 4, 7, 300, 3000] {
        let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(1));
        prove(&mut a, &mut b, &mut left, &mut right).unwrap();
        a.write(&words);
        carry(&mut left, &mut right, |bytes| bytes[at] ^= 1);
        match b.read() {
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::InvalidData, "byte {at}: {e}"),
            // A record that has become longer has not come whole. What stands before the length means nothing.
            Ok(None) => assert_eq!(at, 4),
            Ok(Some(bytes)) => assert!(at < 3 && bytes == words, "byte {at} was changed unseen"),
        }
    }
}

#[test]
fn what_came_right_is_read_before_the_error_which_stays() {
    let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(1));
    prove(&mut a, &mut b, &mut left, &mut right).unwrap();
    a.write(WORDS);
    let right_until = 5 + WORDS.len() + 17;
    a.write(WORDS);
    carry(&mut left, &mut right, |bytes| {
        assert_eq!(bytes.len(), 2 * right_until);
        bytes[right_until + 9] ^= 1;
    });
    assert_eq!(b.read().unwrap().unwrap(), WORDS);
    for _ in 0..3 {
        assert_eq!(b.read().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

#[test]
fn what_was_recorded_is_worth_nothing_a_second_time() {
    let (mut a, mut b, mut left, mut right) = tapped(&key(1), &key(1));
    a.write(WORDS);
    let mut recorded = vec![carry(&mut left, &mut right, |_| {})];
    b.read().unwrap();
    carry(&mut right, &mut left, |_| {});
    a.read().unwrap();
    recorded.push(carry(&mut left, &mut right, |_| {}));
    assert_eq!(b.read().unwrap().unwrap(), WORDS);
    let (mut a, mut b) = ends();
    for bytes in recorded {
        a.socket.write_all(&bytes).unwrap();
        match b.read() {
            Ok(None) => {}
            Ok(Some(bytes)) => panic!("it takes a recording: {bytes:?}"),
            Err(_) => return,
        }
    }
    panic!("it takes a recording");
}

#[test]
fn the_end_of_the_stream_comes_after_what_was_said() {
    let (mut a, mut b) = ends();
    a.write(WORDS);
    for _ in 0..3 {
        assert_eq!(b.read().unwrap_or_default(), None);
        assert_eq!(a.read().unwrap(), None);
        if !a.tls.connection.is_handshaking() {
            break;
        }
    }
    drop(a);
    assert_eq!(b.read().unwrap().unwrap(), WORDS);
    assert_eq!(b.read().unwrap().unwrap(), b"");
}

/// More than sockets hold: a writer is told that there is no room, and goes on when there is.
#[test]
fn a_full_socket_holds_the_writer_up() {
    let (mut a, mut b) = ends();
    let bytes: Vec<u8> = (0..5_000_000u32).flat_map(|i| i.to_le_bytes()).collect();
    let (mut sent, mut got, mut full) = (0, Vec::new(), 0);
    while got.len() < bytes.len() {
        let n = if sent < bytes.len() { a.write(&bytes[sent..]) } else { 0 };
        sent += n;
        full += usize::from(n == 0 && a.tls.wants_write());
        a.tls.flush(&a.socket).unwrap();
        assert_eq!(a.read().unwrap(), None);
        if let Some(more) = b.read().unwrap() {
            got.extend(more);
        }
    }
    assert!(got == bytes && full > 0);
    assert!(!a.tls.wants_write() && !b.tls.is_ahead());
}

/// A read that takes all there is finds the end of the stream behind it, and must not lose what it has taken.
#[test]
fn a_pipe_loses_nothing_of_what_was_said_before_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pipe = |stream: TcpStream, tls: io::Result<Tls>| {
        TcpPipe::encrypted(stream, Box::new(tls.unwrap()), &TcpOptions::default()).unwrap()
    };
    let mut a = pipe(TcpStream::connect(listener.local_addr().unwrap()).unwrap(), Tls::connector(&key(1)));
    let mut b = pipe(listener.accept().unwrap().0, Tls::acceptor(&key(1)));
    let words = WORDS.repeat(4096);
    let (mut said, mut heard) = (0, vec![0; words.len()]);
    let until = Instant::now() + Duration::from_secs(20);
    while said < words.len() || a.has_backlog() {
        said += a.write(&[IoSlice::new(&words[said..])]).unwrap();
        a.flush().unwrap();
        // Both sides read, or they could not prove themselves.
        let _ = (a.peek().unwrap(), b.arm(false).unwrap());
        if said < words.len() {
            b.peek().unwrap();
        }
        assert!(Instant::now() < until);
    }
    drop(a);
    let mut at = 0;
    while at < words.len() {
        at += b.read(&mut heard[at..]).unwrap();
        assert!(Instant::now() < until, "{at} of {} bytes came", words.len());
    }
    assert!(heard == words);
    loop {
        match b.peek() {
            Ok(bytes) => assert!(bytes.is_empty() && Instant::now() < until),
            Err(cause) => break assert_eq!(cause, Cause::Exited),
        }
    }
}
