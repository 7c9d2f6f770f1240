//! Orders to start one more worker, with the pipes that it writes to: from the launcher to the guard, which was forked
//! before these pipes were made. Each is one message of a socket that keeps messages apart.
#![forbid(unsafe_code)]

use super::super::guard::RankSpec;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// Bytes of the variables of one worker.
const VARIABLES_BYTES_MAX: usize = 64 << 10;

/// The launcher's end and the guard's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one order.
pub fn send(to: impl AsFd, number: usize, spec: &RankSpec) -> io::Result<()> {
    let mut text = number.to_string();
    for (name, value) in &spec.variables {
        text.push('\0');
        text.push_str(name);
        text.push('=');
        text.push_str(value);
    }
    if text.len() > VARIABLES_BYTES_MAX {
        return Err(io::Error::other("the variables of a worker are too long"));
    }
    let descriptors = [spec.stdout.as_fd(), spec.stderr.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)), "there is space for two");
    sendmsg(to, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one order; `None` when the launcher has gone.
pub fn receive(from: impl AsFd) -> io::Result<Option<(usize, RankSpec)>> {
    let mut bytes = vec![0; VARIABLES_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if received == 0 {
        return Ok(None);
    }
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let text = String::from_utf8_lossy(&bytes[..received]).into_owned();
    let mut parts = text.split('\0');
    let number = parts.next().and_then(|number| number.parse().ok());
    let variables = parts.filter_map(|part| part.split_once('='));
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    match (number, descriptors.pop(), descriptors.pop()) {
        (Some(number), Some(stderr), Some(stdout)) => {
            Ok(Some((number, RankSpec { variables, stdout, stderr })))
        }
        _ => Err(io::Error::other("an order of the launcher is malformed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn an_order_arrives_with_its_pipes() {
        let (ours, theirs) = pair().unwrap();
        let (out_reader, stdout) = rustix::pipe::pipe().unwrap();
        let (err_reader, stderr) = rustix::pipe::pipe().unwrap();
        let variables = vec![("A".to_owned(), "1=2 x".to_owned()), ("B".to_owned(), String::new())];
        send(&ours, 7, &RankSpec { variables: variables.clone(), stdout, stderr }).unwrap();
        let (number, spec) = receive(&theirs).unwrap().unwrap();
        assert_eq!((number, spec.variables), (7, variables));
        for (pipe, reader, words) in [(spec.stdout, out_reader, "out"), (spec.stderr, err_reader, "err")] {
            File::from(pipe).write_all(words.as_bytes()).unwrap();
            let mut text = String::new();
            File::from(reader).read_to_string(&mut text).unwrap();
            assert_eq!(text, words, "and nobody else holds its end");
        }
        drop(ours);
        assert!(receive(&theirs).unwrap().is_none());
    }
}
