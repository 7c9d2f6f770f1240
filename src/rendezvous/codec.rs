//! Little-endian fields with bounds: what the rendezvous says on the wire.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Why bytes could not be understood. The words go into errors that name the sender.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed(pub &'static str);

/// Appends fields.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// One byte.
    pub fn byte(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }
    /// Four bytes.
    pub fn word(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    /// Eight bytes.
    pub fn long(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    /// Bytes of a length that both sides know.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// A length and as many bytes. Text of ours that is longer than `max` is cut at a character.
    pub fn text(&mut self, text: &str, max: usize) -> &mut Self {
        let mut end = text.len().min(max);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.word(end as u32).raw(&text.as_bytes()[..end])
    }
    /// A family, an address and a port.
    pub fn address(&mut self, address: &SocketAddr) -> &mut Self {
        match address.ip() {
            IpAddr::V4(ip) => self.byte(4).raw(&ip.octets()),
            IpAddr::V6(ip) => self.byte(6).raw(&ip.octets()),
        };
        self.raw(&address.port().to_le_bytes())
    }
    /// A value that may be missing.
    pub fn option(&mut self, value: Option<u32>) -> &mut Self {
        match value {
            Some(value) => self.byte(1).word(value),
            None => self.byte(0),
        }
    }
}

/// Takes fields off, each held against the bytes that are there.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `n` bytes.
    pub fn raw(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        if n > self.0.len() {
            return Err(Malformed("it ends too early"));
        }
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        Ok(head)
    }
    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.raw(N)?.try_into().expect("raw gives as many bytes as asked"))
    }
    /// One byte.
    pub fn byte(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }
    /// Four bytes.
    pub fn word(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    pub fn long(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A count of at most `max` items, each of which takes at least `item_bytes` of what is left.
    pub fn count(&mut self, max: usize, item_bytes: usize) -> Result<usize, Malformed> {
        let count = self.word()? as usize;
        if count > max || count.saturating_mul(item_bytes) > self.0.len() {
            return Err(Malformed("a count is beyond its bound"));
        }
        Ok(count)
    }
    /// A text of at most `max` bytes.
    pub fn text(&mut self, max: usize) -> Result<String, Malformed> {
        let len = self.count(max, 1)?;
        let text = std::str::from_utf8(self.raw(len)?).map_err(|_| Malformed("a text is not UTF-8"))?;
        Ok(text.to_owned())
    }
    /// A family, an address and a port.
    pub fn address(&mut self) -> Result<SocketAddr, Malformed> {
        let ip = match self.byte()? {
            4 => IpAddr::V4(Ipv4Addr::from(self.array::<4>()?)),
            6 => IpAddr::V6(Ipv6Addr::from(self.array::<16>()?)),
            _ => return Err(Malformed("an address is neither IPv4 nor IPv6")),
        };
        Ok(SocketAddr::new(ip, u16::from_le_bytes(self.array()?)))
    }
    /// A value that may be missing.
    pub fn option(&mut self) -> Result<Option<u32>, Malformed> {
        match self.byte()? {
            0 => Ok(None),
            1 => Ok(Some(self.word()?)),
            _ => Err(Malformed("an option is neither there nor missing")),
        }
    }
    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("bytes are left over")) }
    }
}
