use super::agreement::{self as a, CutItem, Kind, UpItem};
use super::cursor::{Members, put_members, put_varint};
use super::signature::{fits, put_signature, signature};
use super::*;
use crate::error::Cause;
use crate::limits::*;
use crate::types::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn causes() -> impl Strategy<Value = Cause> {
    let text = "\\PC{0,40}";
    prop_oneof![
        Just(Cause::Exited),
        any::<u64>().prop_map(|for_ms| Cause::Silent { for_ms }),
        text.prop_map(Cause::Misbehaved),
        text.prop_map(Cause::Corrupted),
        (text, vec(any::<u32>().prop_map(Rank), 0..5))
            .prop_map(|(tensor, missing)| Cause::Stalled { tensor, missing }),
        text.prop_map(Cause::System),
        text.prop_map(Cause::Unreachable),
        text.prop_map(Cause::Aborted),
        any::<u32>().prop_map(|epoch| Cause::Excluded { epoch: Epoch(epoch) }),
        any::<(u32, u32)>().prop_map(|(here, of)| Cause::Minority { here, of }),
    ]
}

fn broken() -> impl Strategy<Value = Broken> {
    (any::<u32>(), proptest::option::of(any::<u32>().prop_map(Rank)), causes())
        .prop_map(|(epoch, culprit, cause)| Broken { epoch: Epoch(epoch), culprit, cause })
}

fn signatures() -> impl Strategy<Value = Signature> {
    let tensor = (0..15u8, vec(0..200u64, 0..5))
        .prop_map(|(dtype, shape)| TensorSignature { dtype: DType::from_code(dtype).unwrap(), shape });
    let head =
        (0..12u8, 0..8u8, any::<f64>(), any::<f64>(), 0..RANKS_MAX as u32, any::<bool>(), any::<bool>());
    (head, vec(tensor, 0..4), vec((0..RANKS_MAX as u32).prop_map(Rank), 0..4)).prop_map(
        |((collective, op, pre, post, root, cuda, present), tensors, ranks)| Signature {
            collective: Collective::from_code(collective).unwrap(),
            op: ReduceOp::from_code(op).unwrap(),
            scale: Scale { pre, post },
            root: Rank(root),
            place: if cuda { Place::Cuda } else { Place::Host },
            join_average: if present { JoinAverage::Present } else { JoinAverage::Size },
            tensors,
            ranks,
        },
    )
}

fn ascending() -> impl Strategy<Value = Vec<Member>> {
    proptest::collection::btree_set(0..300u32, 0..30).prop_map(|set| set.into_iter().map(Member).collect())
}

fn put_table(out: &mut Vec<u8>, members: &[Member], width: usize) {
    a::put_rows(out, width, members.len(), |i| members[i], |i, j| (i * 1000 + j) as u64);
}

/// A body of each kind, with many items.
fn ups() -> impl Strategy<Value = Vec<u8>> {
    (signatures(), signatures(), ascending(), ascending(), "\\PC{0,20}", 0..3usize, any::<u32>()).prop_map(
        |(s, t, absent, present, name, width, number)| {
            let mut out = Vec::new();
            a::put_range(&mut out, TensorKey(number / 2), 1 + number % 1000);
            a::put_ready(&mut out, TensorKey(number));
            put_members(&mut out, &absent);
            put_table(&mut out, &present, width);
            let second = (number % 2 == 0).then_some((Member(number % 999), &t, 3));
            let refused = (number % 3 == 0).then_some((Member(7), name.as_str()));
            a::put_announce(&mut out, &name, (Member(1), &s, width), second, refused);
            put_members(&mut out, &absent);
            put_table(&mut out, &present, width);
            a::put_joined(&mut out, &present);
            a::put_overdue(&mut out, &name, u64::from(number) << 20);
            a::put_report(&mut out, number, &absent);
            out
        },
    )
}

fn cuts() -> impl Strategy<Value = Vec<u8>> {
    (signatures(), ascending(), ascending(), "\\PC{0,20}", 0..3usize, any::<u32>()).prop_map(
        |(s, absent, present, name, width, number)| {
            let mut out = Vec::new();
            a::put_range(&mut out, TensorKey(number / 2), 1 + number % 1000);
            a::put_ready(&mut out, TensorKey(number));
            put_members(&mut out, &absent);
            put_table(&mut out, &present, width);
            a::put_define(&mut out, &name, &s);
            put_members(&mut out, &absent);
            put_table(&mut out, &present, width);
            a::put_fail(&mut out, &name, &name);
            a::put_all_joined(&mut out, Member(number % 60000));
            out
        },
    )
}

fn read_ups(bytes: &[u8]) -> Result<usize, Malformed> {
    let mut reader = Reader::new(bytes);
    let mut items = 0;
    while let Some(item) = a::up_item(&mut reader)? {
        items += 1;
        match item {
            UpItem::Ready { absent, call, .. } | UpItem::Announce { absent, call, .. } => walk(absent, call),
            UpItem::Joined { members } | UpItem::Report { missing: members, .. } => {
                walk(members, a::Rows::NONE)
            }
            UpItem::ReadyRange { .. } | UpItem::Overdue { .. } => {}
        }
    }
    Ok(items)
}

fn read_cuts(bytes: &[u8]) -> Result<usize, Malformed> {
    let mut reader = Reader::new(bytes);
    let mut items = 0;
    while let Some(item) = a::cut_item(&mut reader)? {
        items += 1;
        if let CutItem::Run { absent, call, .. } | CutItem::Define { absent, call, .. } = item {
            walk(absent, call);
        }
    }
    Ok(items)
}

/// What has been accepted can be walked to its end, in order.
fn walk(members: Members<'_>, rows: a::Rows<'_>) {
    let list: Vec<Member> = members.iter().collect();
    assert_eq!(list.len(), members.len());
    assert!(list.is_sorted() && list.iter().all(|member| (member.0 as usize) < RANKS_MAX));
    let (mut visits, mut last) = (0, None);
    rows.for_each(|member, index, value| {
        visits += 1;
        assert!(value <= TENSOR_BYTES_MAX && index < rows.width);
        assert!(last < Some((member, index)));
        last = Some((member, index));
    });
    assert_eq!(visits, rows.len() * rows.width);
}

proptest! {
    #[test]
    fn messages_come_back(it in broken(), set in any::<u32>(), body in vec(any::<u8>(), 0..50)) {
        let messages = [
            Message::Coordination { set: SetId(set), body: &body },
            Message::Heartbeat,
            Message::Goodbye { who: Rank(set), clean: set % 2 == 0, sent: u64::from(set) << 20 },
            Message::Closed { set: SetId(set), who: Rank(7) },
            Message::Mark { set: SetId(set), mark: u64::from(set) << 7 },
            Message::Ballot {
                verdict: set % 2 == 0,
                broken: it.clone(),
                marks: (0..set % 4).map(|place| (SetId(place * 300), u64::from(set / 7))).collect(),
            },
            Message::Abort(it),
        ];
        let mut bytes = Vec::new();
        for message in messages {
            message.encode(&mut bytes);
            prop_assert_eq!(Message::decode(&bytes), Ok(message.clone()));
            let whole = bytes.len() - if let Message::Coordination { .. } = message { body.len() } else { 0 };
            for cut in 0..whole {
                prop_assert!(Message::decode(&bytes[..cut]).is_err());
            }
        }
    }

    #[test]
    fn signatures_come_back_bit_for_bit_and_not_when_cut_short(it in signatures()) {
        prop_assume!(fits(&it).is_ok());
        let mut bytes = Vec::new();
        put_signature(&mut bytes, &it);
        let mut reader = Reader::new(&bytes);
        let back = signature(&mut reader).unwrap();
        prop_assert!(reader.end().is_ok());
        let mut again = Vec::new();
        put_signature(&mut again, &back);
        prop_assert_eq!(&again, &bytes);
        for cut in 0..bytes.len() {
            prop_assert!(signature(&mut Reader::new(&bytes[..cut])).is_err());
        }
    }

    #[test]
    fn members_come_back(list in ascending()) {
        let mut bytes = Vec::new();
        put_members(&mut bytes, &list);
        let mut reader = Reader::new(&bytes);
        let members = reader.members().unwrap();
        prop_assert_eq!(members.iter().collect::<Vec<_>>(), list);
        prop_assert!(reader.end().is_ok());
    }

    #[test]
    fn numbers_have_one_encoding(bytes in vec(any::<u8>(), 0..12)) {
        let mut reader = Reader::new(&bytes);
        if let Ok(value) = reader.varint() {
            let mut again = Vec::new();
            put_varint(&mut again, value);
            prop_assert_eq!(&again[..], &bytes[..bytes.len() - reader.remaining()]);
        }
    }

    #[test]
    fn bodies_come_back(up in ups(), cut in cuts()) {
        prop_assert_eq!(read_ups(&up), Ok(6));
        prop_assert_eq!(read_cuts(&cut), Ok(5));
    }

    #[test]
    fn decoders_are_total(bytes in vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(&bytes);
        let _ = a::header(&mut Reader::new(&bytes));
        let _ = read_ups(&bytes);
        let _ = read_cuts(&bytes);
        let _ = a::query(&mut Reader::new(&bytes));
        let _ = a::stalled(&mut Reader::new(&bytes));
        if let Ok(it) = signature(&mut Reader::new(&bytes)) {
            // The products that other floors take of shapes cannot overflow.
            it.tensors.iter().for_each(|t| { let _ = (t.elements(), t.row_elements()); });
            prop_assert!(fits(&it).is_ok());
        }
    }

    #[test]
    fn decoders_are_total_on_almost_valid_bytes(
        up in ups(),
        cut in cuts(),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
        kept in any::<prop::sample::Index>(),
    ) {
        for (bytes, read) in [(up, read_ups as fn(&[u8]) -> _), (cut, read_cuts)] {
            let _ = read(&bytes[..kept.index(bytes.len())]);
            let mut bytes = bytes;
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = read(&bytes);
        }
    }
}

#[test]
fn limits_hold_before_anything_is_reserved() {
    let huge = |head: &[u8]| {
        let mut bytes = head.to_vec();
        put_varint(&mut bytes, u64::MAX);
        bytes
    };
    assert!(Reader::new(&huge(&[])).text(NAME_BYTES_MAX).is_err());
    assert!(Reader::new(&huge(&[])).members().is_err());
    assert!(read_ups(&huge(&[1, 0])).is_err());
    // A signature of 65,536 tensors that ends after its head.
    let mut bytes = Vec::new();
    put_signature(
        &mut bytes,
        &Signature {
            collective: Collective::Allreduce,
            op: ReduceOp::Sum,
            scale: Scale::default(),
            root: Rank(0),
            place: Place::Host,
            join_average: JoinAverage::Size,
            tensors: Vec::new(),
            ranks: Vec::new(),
        },
    );
    bytes.truncate(bytes.len() - 2);
    put_varint(&mut bytes, GROUP_TENSORS_MAX as u64);
    assert_eq!(signature(&mut Reader::new(&bytes)), Err(Malformed("a count of more than what follows")));
    assert!(Message::decode(&vec![1; CONTROL_BYTES_MAX + 1]).is_err());
}

#[test]
fn shapes_whose_product_overflows_do_not_fit() {
    let tensor = |shape: &[u64]| Signature {
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: vec![TensorSignature { dtype: DType::F32, shape: shape.to_vec() }],
        ranks: Vec::new(),
    };
    assert!(fits(&tensor(&[0, 1 << 40, 1 << 40])).is_err());
    assert!(fits(&tensor(&[1 << 44])).is_ok());
    assert!(fits(&tensor(&[(1 << 44) + 1])).is_err());
    assert!(fits(&tensor(&[1; 65])).is_err());
    let of = |ranks: &[u32]| Signature { ranks: ranks.iter().copied().map(Rank).collect(), ..tensor(&[1]) };
    assert!(fits(&of(&[0, RANKS_MAX as u32 - 1])).is_ok());
    assert!(fits(&of(&[0, RANKS_MAX as u32])).is_err());
}

#[test]
fn headers_refuse_flags_that_a_kind_has_not() {
    for kind in [Kind::Up, Kind::Cut, Kind::Nack, Kind::Query, Kind::Stalled] {
        for flags in 0..=8u8 {
            let mut bytes = Vec::new();
            a::put_header(&mut bytes, kind, flags);
            let allowed = match kind {
                Kind::Up => flags < 8,
                Kind::Cut => flags < 2,
                _ => flags == 0,
            };
            assert_eq!(
                a::header(&mut Reader::new(&bytes)),
                if allowed {
                    Ok((kind, flags))
                } else {
                    Err(Malformed("an agreement message with unknown flags"))
                }
            );
        }
    }
}
