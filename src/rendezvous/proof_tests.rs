use super::*;
use proptest::prelude::*;

fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

fn hello(secret: &Secret) -> Hello {
    Hello {
        build: "test".into(),
        job: secret.job(),
        epoch: Epoch(5),
        rank: Rank(2),
        peer: Rank(1),
        purpose: Purpose::Control,
        link: 77,
        refuses_clear: false,
        nonce: nonce().unwrap(),
    }
}

fn accept() -> Accept {
    Accept { me: Rank(1), size: 3, epoch: Some(Epoch(5)), serves: |p| p == Purpose::Control }
}

type Outcome = std::result::Result<(), ProofError>;

/// Carries bytes between both sides, with `spoil` for what the n-th message becomes, until nothing moves. A
/// side that wants more than has come sees the connection closed.
fn run(
    a: &mut Handshake,
    b: &mut Handshake,
    mut spoil: impl FnMut(usize, &mut Vec<u8>),
) -> (Outcome, Outcome) {
    let mut results = [Ok(()), Ok(())];
    let (mut pipes, mut count) = ([Vec::new(), Vec::new()], 0);
    loop {
        let mut moved = false;
        for (i, side) in [&mut *a, &mut *b].into_iter().enumerate() {
            let mut output = side.take_output();
            if !output.is_empty() {
                spoil(count, &mut output);
                count += 1;
                pipes[1 - i].extend(output);
                moved = true;
            }
            let want = side.wants();
            if want > 0 && pipes[i].len() >= want {
                let bytes: Vec<u8> = pipes[i].drain(..want).collect();
                results[i] = side.feed(&bytes);
                moved = true;
            }
        }
        if !moved {
            let [first, second] = results;
            return (first, second);
        }
    }
}

fn pair(hello: Hello, accept: Accept, ours: &Secret, theirs: &Secret) -> (Handshake, Handshake) {
    (Handshake::connector(ours, hello), Handshake::acceptor(theirs, accept))
}

#[test]
fn two_sides_that_belong_together_prove_it() {
    let secret = secret(1);
    let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
    assert_eq!(run(&mut a, &mut b, |_, _| {}), (Ok(()), Ok(())));
    let (there, here) = (a.proven().unwrap(), b.proven().unwrap());
    assert_eq!((there.rank, here.rank, here.link, here.purpose), (Rank(1), Rank(2), 77, Purpose::Control));
    assert_eq!((a.wants(), b.wants()), (0, 0));
}

#[test]
fn each_difference_has_its_own_error() {
    let own = secret(1);
    let check = |change: fn(&mut Hello), expected: ProofError| {
        let mut hello = hello(&own);
        change(&mut hello);
        let (mut a, mut b) = pair(hello, accept(), &own, &own);
        let (_, acceptor) = run(&mut a, &mut b, |_, _| {});
        assert_eq!(acceptor, Err(expected));
        assert!(a.proven().is_none() && b.proven().is_none());
    };
    check(|h| h.epoch = Epoch(4), ProofError::WrongEpoch { ours: Epoch(5), theirs: Epoch(4) });
    check(|h| h.rank = Rank(3), ProofError::WrongRank { expected: None, claimed: Rank(3) });
    check(|h| h.rank = Rank(1), ProofError::WrongRank { expected: None, claimed: Rank(1) });
    check(|h| h.peer = Rank(0), ProofError::WrongPeer { sought: Rank(0) });
    check(|h| h.purpose = Purpose::Shm, ProofError::WrongPurpose(Purpose::Shm));
    check(|h| h.job = JobId([0; 16]), ProofError::OtherJob);
}

#[test]
fn the_connector_finds_the_wrong_rank() {
    let secret = secret(1);
    let (mut a, mut b) = pair(hello(&secret), Accept { me: Rank(0), ..accept() }, &secret, &secret);
    let (connector, acceptor) = run(&mut a, &mut b, |_, _| {});
    assert_eq!(connector, Err(ProofError::WrongRank { expected: Some(Rank(1)), claimed: Rank(0) }));
    assert_eq!(acceptor, Err(ProofError::WrongPeer { sought: Rank(1) }));
}

#[test]
fn another_secret_is_another_job_and_cannot_prove_ours() {
    let (ours, theirs) = (secret(1), secret(2));
    let (mut a, mut b) = pair(hello(&ours), accept(), &ours, &theirs);
    assert_eq!(run(&mut a, &mut b, |_, _| {}), (Err(ProofError::OtherJob), Err(ProofError::OtherJob)));
    // One that has overheard the job's name gets no further.
    let (mut a, mut b) = pair(hello(&theirs), accept(), &ours, &theirs);
    assert_eq!(run(&mut a, &mut b, |_, _| {}).1, Err(ProofError::WrongSecret));
    assert!(b.proven().is_none() && b.take_output().is_empty());
}

#[test]
fn a_mismatch_of_versions_names_both_on_both_sides() {
    let secret = secret(1);
    let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
    let other = |_: usize, message: &mut Vec<u8>| message[8] = 9;
    let (connector, acceptor) = run(&mut a, &mut b, other);
    assert_eq!(acceptor, Err(ProofError::Version { theirs: 9, build: "test".into() }));
    let words = connector.unwrap_err().to_string();
    assert!(
        words.contains(&format!("version {PROTOCOL}"))
            && words.contains("version 9")
            && words.contains("carole"),
        "{words}"
    );
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let secret = secret(1);
    let sizes = {
        let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
        let mut sizes = Vec::new();
        let _ = run(&mut a, &mut b, |_, message| sizes.push(message.len()));
        sizes
    };
    assert_eq!(sizes.len(), 4);
    for (message, size) in sizes.into_iter().enumerate() {
        for at in 0..size {
            let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
            let _ = run(&mut a, &mut b, |n, bytes| {
                if n == message {
                    bytes[at] ^= 0x10;
                }
            });
            // The last message is the acceptor's proof: by then the connector has proven itself rightly.
            assert!(a.proven().is_none(), "message {message}, byte {at}");
            assert!(b.proven().is_none() || message == 3, "message {message}, byte {at}");
        }
    }
}

#[test]
fn a_truncated_message_proves_nothing() {
    let secret = secret(1);
    for message in 0..4 {
        let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
        let _ = run(&mut a, &mut b, |n, bytes| {
            if n == message {
                bytes.pop();
            }
        });
        assert!(a.proven().is_none());
        assert!(b.proven().is_none() || message == 3);
    }
}

#[test]
fn a_replay_of_a_good_handshake_proves_nothing() {
    let secret = secret(1);
    let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
    let mut heard = Vec::new();
    let _ = run(&mut a, &mut b, |_, message| heard.push(message.clone()));
    let mut victim = Handshake::acceptor(&secret, accept());
    victim.feed(&heard[0][..16]).unwrap();
    victim.feed(&heard[0][16..]).unwrap();
    assert_eq!(victim.feed(&heard[2]), Err(ProofError::WrongSecret));
    let mut victim = Handshake::connector(&secret, hello(&secret));
    victim.feed(&heard[1][..16]).unwrap();
    victim.feed(&heard[1][16..]).unwrap();
    assert_eq!(victim.feed(&heard[3]), Err(ProofError::WrongSecret));
}

#[test]
fn a_reflection_proves_nothing() {
    let secret = secret(1);
    // As it is, the rank gives it away.
    let mut victim = Handshake::connector(&secret, hello(&secret));
    let own = victim.take_output();
    victim.feed(&own[..16]).unwrap();
    assert!(matches!(victim.feed(&own[16..]), Err(ProofError::WrongRank { .. })));
    // Even where the hello could pass, the connector's proof is not an acceptor's.
    let (mut a, mut b) = pair(hello(&secret), accept(), &secret, &secret);
    let mut proof = Vec::new();
    let _ = run(&mut a, &mut b, |n, message| match n {
        2 => proof = message.clone(),
        3 => *message = proof.clone(),
        _ => {}
    });
    assert!(a.proven().is_none());
}

#[test]
fn lengths_are_held_against_the_bound_before_anything_is_kept() {
    for len in [0u32, HANDSHAKE_BYTES_MAX as u32, u32::MAX] {
        let mut prefix = Writer::default();
        prefix.raw(&MAGIC).word(PROTOCOL).word(len);
        let mut victim = Handshake::acceptor(&secret(1), accept());
        assert!(matches!(victim.feed(&prefix.0), Err(ProofError::Malformed(_))));
        assert!(victim.take_output().is_empty(), "nothing is said to such a one");
    }
}

proptest! {
    #[test]
    fn garbage_is_never_a_panic_nor_a_proof(bytes in proptest::collection::vec(any::<u8>(), 0..600), prefixed: bool) {
        let secret = secret(1);
        let mut stream = Writer::default();
        if prefixed {
            stream.raw(&MAGIC).word(PROTOCOL).word(90);
        }
        stream.raw(&bytes);
        for mut side in [Handshake::acceptor(&secret, accept()), Handshake::connector(&secret, hello(&secret))] {
            let mut rest = stream.0.as_slice();
            while side.wants() > 0 && rest.len() >= side.wants() {
                let (head, tail) = rest.split_at(side.wants());
                rest = tail;
                let _ = side.feed(head);
            }
            prop_assert!(side.proven().is_none());
        }
    }

    #[test]
    fn a_hello_says_what_it_said(rank: u32, peer: u32, epoch: u32, link: u64, lane: u8) {
        let purpose = Purpose::Lane(lane);
        let hello = Hello { rank: Rank(rank), peer: Rank(peer), epoch: Epoch(epoch), link, purpose, ..hello(&secret(3)) };
        prop_assert_eq!(decode(&encode(&hello)[PREFIX_BYTES..]), Ok(hello));
    }
}

#[test]
fn a_connection_in_clear_is_refused_by_name_where_it_must_be_encrypted() {
    let (mut a, mut b) = pair(hello(&secret(3)), accept(), &secret(3), &secret(3));
    b.refuse_clear();
    assert_eq!(run(&mut a, &mut b, |_, _| {}), (Err(ProofError::Clear), Err(ProofError::Clear)));
    assert!(a.proven().is_none() && b.proven().is_none());
}
