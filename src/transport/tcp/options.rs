//! Socket options of a payload connection.
#![forbid(unsafe_code)]

use crate::error::Cause;
use crate::limits::SILENCE_MS;
use socket2::{SockRef, TcpKeepalive};
use std::net::TcpStream;
use std::time::Duration;

/// Loopback has no delay that the kernel's tuning could go by; this holds a window of a large tensor.
const LOOPBACK_BUFFER_BYTES: usize = 4 << 20;

/// What may be set about a TCP pipe.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Bytes that the kernel buffers in each direction. None: `LOOPBACK_BUFFER_BYTES` on loopback; elsewhere the
    /// kernel's own tuning, which follows the bandwidth and delay of the path and goes far beyond what may be set
    /// by hand.
    pub buffer_bytes: Option<usize>,
    /// The congestion control by name. None: the system's own, but cubic on loopback, where bbr (the default
    /// of some systems) halves the throughput.
    pub congestion: Option<String>,
    /// A connection whose bytes stay unacknowledged for so long is broken.
    pub user_timeout_ms: u64,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions { buffer_bytes: None, congestion: None, user_timeout_ms: 2 * SILENCE_MS }
    }
}

impl TcpOptions {
    /// Sets these options on a connected socket.
    pub(super) fn apply(&self, stream: &TcpStream) -> Result<(), Cause> {
        let socket = SockRef::from(stream);
        let fails = |what: &'static str| move |e: std::io::Error| Cause::System(format!("{what}: {e}"));
        socket.set_tcp_nodelay(true).map_err(fails("TCP_NODELAY"))?;
        let on_loopback = stream.peer_addr().is_ok_and(|a| a.ip().to_canonical().is_loopback());
        if let Some(bytes) = self.buffer_bytes.or(on_loopback.then_some(LOOPBACK_BUFFER_BYTES)) {
            // The kernel cuts this to its own maximum, which is no error.
            socket.set_send_buffer_size(bytes).map_err(fails("SO_SNDBUF"))?;
            socket.set_recv_buffer_size(bytes).map_err(fails("SO_RCVBUF"))?;
        }
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(5))
            .with_interval(Duration::from_secs(1))
            .with_retries(3);
        socket.set_tcp_keepalive(&keepalive).map_err(fails("SO_KEEPALIVE"))?;
        let timeout = Duration::from_millis(self.user_timeout_ms);
        socket.set_tcp_user_timeout(Some(timeout)).map_err(fails("TCP_USER_TIMEOUT"))?;
        match &self.congestion {
            Some(name) => socket
                .set_tcp_congestion(name.as_bytes())
                .map_err(|e| Cause::System(format!("congestion control '{name}': {e}")))?,
            None if on_loopback => {
                // Only faster; a kernel without cubic works as well.
                let _ = socket.set_tcp_congestion(b"cubic");
            }
            None => {}
        }
        Ok(())
    }
}
