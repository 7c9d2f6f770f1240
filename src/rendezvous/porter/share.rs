//! What the two ends of a shared-memory link say to each other after the proof: the memory and both
//! processes' eventfds cross as descriptors. And the words that follow a knock.
#![forbid(unsafe_code)]

use crate::error::Cause;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Connector: here is a segment and my eventfd, and my board if I have one.
pub const OFFER: u8 = b'S';
/// Acceptor: opened; here is my eventfd, and my board if I have one.
pub const ACCEPT: u8 = b'A';
/// Acceptor: it cannot be opened; the reason follows.
pub const REFUSE: u8 = b'R';
/// To one that has knocked: the link is still being made.
pub const TRYING: u8 = b'T';
/// Connector: the link is up.
pub const GO: u8 = b'G';
/// Bytes of a reason, padded with spaces.
pub const REASON_BYTES: usize = 240;
const DESCRIPTORS_MAX: usize = 3;

/// Sends one byte with descriptors. The socket is new, so there is room.
pub fn send(socket: impl AsFd, word: u8, descriptors: &[BorrowedFd<'_>]) -> Result<(), Cause> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "there is space for DESCRIPTORS_MAX");
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match sendmsg(socket, &[IoSlice::new(&[word])], &mut control, flags) {
        Ok(_) => Ok(()),
        Err(e) => Err(Cause::System(format!("descriptors for shared memory could not be sent: {e}"))),
    }
}

/// Receives one byte and its descriptors; `None` when nothing has come yet.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(u8, Vec<OwnedFd>)>> {
    let mut word = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    match recvmsg(socket, &mut [IoSliceMut::new(&mut word)], &mut control, flags) {
        Ok(message) if message.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => {}
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(Some((word[0], descriptors)))
}

/// A refusal and its reason.
pub fn refusal(reason: &str) -> Vec<u8> {
    let mut bytes = vec![REFUSE];
    bytes.extend(reason.bytes().take(REASON_BYTES));
    bytes.resize(1 + REASON_BYTES, b' ');
    bytes
}
