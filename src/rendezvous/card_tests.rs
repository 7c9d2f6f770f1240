use super::*;
use proptest::prelude::*;

/// A card to change for a test.
pub(in crate::rendezvous) fn card(rank: u32) -> Card {
    Card {
        rank: Rank(rank),
        hints: Hints { local_rank: Some(rank), ..Hints::default() },
        host_id: "boot/1".into(),
        hostname: "host".into(),
        pid: 100 + rank,
        build: "carole 0".into(),
        simd: 3,
        addresses: vec!["127.0.0.1:7".parse().unwrap(), "[::1]:8".parse().unwrap()],
        socket: Some([rank as u8; 16]),
    }
}

fn table() -> Table {
    let knobs = vec![("CAROLE_A".to_owned(), "1".to_owned())];
    Table {
        epoch: Epoch(4),
        job: JobId([9; 16]),
        cards: vec![card(0), card(1)],
        knobs,
        simd: 2,
        sets: Sets::default(),
    }
}

#[test]
fn what_is_sent_is_what_arrives() {
    let registration = Registration { card: card(3), size: 5, knobs: table().knobs, past: None };
    assert_eq!(Registration::decode(&registration.encode()), Ok(registration));
    for answer in [
        Answer::Table(table()),
        Answer::Refused("no".into()),
        Answer::NotYet,
        Answer::Come,
        Answer::Elsewhere(Rank(4)),
        Answer::Excluded(Epoch(3)),
        Answer::Minority { here: 1, of: 3 },
        Answer::News(News { added: true, removed: false }),
    ] {
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
    }
}

#[test]
fn every_truncation_and_every_surplus_is_refused() {
    let bytes = Answer::Table(table()).encode();
    for end in 0..bytes.len() {
        assert!(Answer::decode(&bytes[..end]).is_err(), "cut at {end}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(Answer::decode(&longer).is_err());
}

#[test]
fn cards_out_of_order_are_refused() {
    let mut table = table();
    table.cards.swap(0, 1);
    assert_eq!(Answer::decode(&Answer::Table(table).encode()), Err(Malformed("the cards are out of order")));
}

#[test]
fn a_count_beyond_the_bytes_that_are_there_allocates_nothing() {
    let mut writer = Writer::default();
    writer.byte(1).word(0).raw(&[0; 16]).byte(0).word(0).word(RANKS_MAX as u32);
    assert_eq!(Answer::decode(&writer.0), Err(Malformed("a count is beyond its bound")));
}

proptest! {
    #[test]
    fn garbage_is_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..200, value: u8) {
        let _ = Answer::decode(&bytes);
        let _ = Registration::decode(&bytes);
        let mut table = Answer::Table(table()).encode();
        let at = at % table.len();
        table[at] = value;
        let _ = Answer::decode(&table);
    }
}
