//! Items of agreement: whatever is accepted can be walked to its end.
#![no_main]

use carole::wire::Reader;
use carole::wire::agreement::{CutItem, UpItem, cut_item, header, query, stalled, up_item};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = header(&mut Reader::new(bytes));
    let _ = query(&mut Reader::new(bytes));
    let _ = stalled(&mut Reader::new(bytes)).map(|(_, _, members)| members.iter().count());
    let mut reader = Reader::new(bytes);
    while let Ok(Some(item)) = up_item(&mut reader) {
        if let UpItem::Ready { absent, call, .. } | UpItem::Announce { absent, call, .. } = item {
            assert_eq!(absent.iter().count(), absent.len());
            let mut visits = 0;
            call.for_each(|_, _, _| visits += 1);
            assert_eq!(visits, call.len() * call.width);
        }
    }
    let mut reader = Reader::new(bytes);
    while let Ok(Some(item)) = cut_item(&mut reader) {
        if let CutItem::Run { absent, .. } = item {
            assert_eq!(absent.iter().count(), absent.len());
        }
    }
});
