//! Memory that devices see: their own, pinned staging, the host's registered for them, and a peer process's.

use super::driver::{Context, Event, Fault, Stream, call};
use super::registered::Registered;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

/// Bytes on the device.
#[derive(Debug)]
pub struct DeviceBytes {
    address: u64,
    len: usize,
    context: Arc<Context>,
}

impl DeviceBytes {
    /// Bytes with arbitrary content.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<DeviceBytes, Fault> {
        let _current = context.enter()?;
        let mut address = 0;
        // SAFETY: the result is written to a variable of ours; the memory is freed in `drop`.
        unsafe { call!(cuMemAlloc_v2(&mut address, len.max(1)))? };
        Ok(DeviceBytes { address, len, context: context.clone() })
    }
    /// Where they are.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for DeviceBytes {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: allocated once; the driver waits for what still uses it.
        let _ = unsafe { call!(cuMemFree_v2(self.address)) };
    }
}

/// Memory of the host that the device reads and writes where it is: staging for links that cannot touch the
/// device's.
#[derive(Debug)]
pub struct PinnedBytes {
    host: *mut u8,
    device: u64,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: the bytes are owned and not shared.
unsafe impl Send for PinnedBytes {}

impl PinnedBytes {
    /// Bytes with arbitrary content.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<PinnedBytes, Fault> {
        let _current = context.enter()?;
        let (mut host, mut device) = (null_mut::<c_void>(), 0);
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: results are written to variables of ours; the memory is freed in `drop`.
        unsafe { call!(cuMemHostAlloc(&mut host, len.max(1), flags))? };
        let mut bytes = PinnedBytes { host: host.cast(), device: 0, len, context: context.clone() };
        // SAFETY: the memory was just allocated for the device to see.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut device, host, 0))? };
        bytes.device = device;
        Ok(bytes)
    }
    /// Where the host sees them.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.host
    }
    /// Where the device sees them.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.device
    }
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for PinnedBytes {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: allocated once.
        let _ = unsafe { call!(cuMemFreeHost(self.host.cast())) };
    }
}

/// A table of rows on its way: pinned on the host, and on the device, where blocks read it over and over.
#[derive(Debug)]
pub(super) struct Table {
    pinned: PinnedBytes,
    device: DeviceBytes,
}

impl Table {
    pub(super) fn new(context: &Arc<Context>, words: usize) -> Result<Table, Fault> {
        let pinned = PinnedBytes::new(context, 8 * words)?;
        Ok(Table { pinned, device: DeviceBytes::new(context, 8 * words)? })
    }
    pub(super) fn words(&self) -> usize {
        self.device.len() / 8
    }
    /// Copies the words on `stream`; gives their address. Nobody may use the table before the copy is over.
    pub(super) fn upload(&mut self, stream: &Stream, words: &[u64]) -> Result<u64, Fault> {
        assert!(words.len() <= self.words(), "a table takes its words");
        let (to, bytes) = (self.device.address(), size_of_val(words));
        // SAFETY: the pinned bytes are ours, as many and 8-byte aligned; the owner of the table keeps both until
        // the stream is past the copy.
        unsafe {
            self.pinned.host().cast::<u64>().copy_from_nonoverlapping(words.as_ptr(), words.len());
            call!(cuMemcpyHtoDAsync_v2(to, self.pinned.host().cast(), bytes, stream.raw))?;
        }
        Ok(to)
    }
}

/// The host's memory (a shared region, a ring) made known to the device for as long as this lives.
#[derive(Debug)]
pub struct HostRegistration {
    host: *mut u8,
    device: u64,
    context: Arc<Context>,
}

// SAFETY: a registration is an address and no access to it.
unsafe impl Send for HostRegistration {}

impl HostRegistration {
    /// Registers `len` bytes.
    ///
    /// # Safety
    /// The bytes must stay mapped for as long as the registration lives.
    pub unsafe fn new(context: &Arc<Context>, host: *mut u8, len: usize) -> Result<HostRegistration, Fault> {
        let _current = context.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemHostRegister_v2(host.cast(), len, flags))? };
        let mut registration = HostRegistration { host, device: 0, context: context.clone() };
        // SAFETY: registered just now.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut registration.device, host.cast(), 0))? };
        Ok(registration)
    }
    /// Where the device sees them.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.device
    }
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: registered once.
        let _ = unsafe { call!(cuMemHostUnregister(self.host.cast())) };
    }
}

/// What another process opens an allocation or an event with.
pub const HANDLE_BYTES: usize = 64;

/// Memory of ours as a peer finds it: a handle of the whole allocation, and where in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exported {
    /// The allocation's.
    pub handle: [u8; HANDLE_BYTES],
    /// The driver's number of the allocation, which names it for ever.
    pub allocation: u64,
    /// From the allocation's start.
    pub offset: u64,
}

/// Handles of our allocations, made once each.
#[derive(Debug)]
pub struct Exports {
    handles: Registered<[u8; HANDLE_BYTES]>,
}

impl Exports {
    /// Remembers at most `most` allocations.
    #[must_use]
    pub fn new(most: usize) -> Exports {
        Exports { handles: Registered::new(most) }
    }

    /// The export of device memory at `address`. Memory from cuMemCreate (torch's expandable segments) has no
    /// such handle: the driver refuses, and the caller stages it.
    pub fn export(&mut self, context: &Context, address: u64) -> Result<Exported, Fault> {
        let _current = context.enter()?;
        let (mut base, mut size, mut allocation) = (0, 0, 0u64);
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
        // SAFETY: results are written to variables of their types; any address may be asked about.
        unsafe {
            call!(cuMemGetAddressRange_v2(&mut base, &mut size, address))?;
            call!(cuPointerGetAttribute((&raw mut allocation).cast(), attribute, base))?;
        }
        let handle = self.handles.get(base, allocation, || {
            let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
            // SAFETY: as above.
            unsafe { call!(cuIpcGetMemHandle(&mut handle, base))? };
            Ok::<_, Fault>(handle.reserved.map(|byte| byte as u8))
        })?;
        Ok(Exported { handle: *handle, allocation, offset: address - base })
    }
}

/// A peer's allocation in our address space, for as long as this lives.
#[derive(Debug)]
struct Opened {
    address: u64,
    context: Arc<Context>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: opened once.
        let _ = unsafe { call!(cuIpcCloseMemHandle(self.address)) };
    }
}

/// One peer's allocations, each opened once: the driver refuses to open one twice.
#[derive(Debug)]
pub struct Imports {
    opened: Registered<Opened>,
    context: Arc<Context>,
}

impl Imports {
    /// Keeps at most `most` allocations open.
    #[must_use]
    pub fn new(context: &Arc<Context>, most: usize) -> Imports {
        Imports { opened: Registered::new(most), context: context.clone() }
    }

    /// Where what the peer exported is in our address space. The caller sees to it that no kernel still reads
    /// an allocation when so many others are imported that it is closed.
    pub fn import(&mut self, exported: &Exported) -> Result<u64, Fault> {
        let context = &self.context;
        let opened = self.opened.get(exported.allocation, exported.allocation, || {
            let _current = context.enter()?;
            let handle = sys::CUipcMemHandle { reserved: exported.handle.map(|byte| byte as i8) };
            let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
            let mut address = 0;
            // SAFETY: the driver checks a handle, whatever bytes a peer sent; closed in `drop`.
            unsafe { call!(cuIpcOpenMemHandle_v2(&mut address, handle, flags))? };
            Ok::<_, Fault>(Opened { address, context: context.clone() })
        })?;
        Ok(opened.address + exported.offset)
    }
}

/// The handle by which a peer opens an event that was made to be shared.
pub fn export_event(event: &Event) -> Result<[u8; HANDLE_BYTES], Fault> {
    let mut handle = sys::CUipcEventHandle { reserved: [0; HANDLE_BYTES] };
    // SAFETY: the event is alive.
    unsafe { call!(cuIpcGetEventHandle(&mut handle, event.raw))? };
    Ok(handle.reserved.map(|byte| byte as u8))
}

/// A peer's event. A wait on it that comes before it was recorded waits for nothing, so that a mark of the host
/// must come between.
pub fn import_event(context: &Arc<Context>, handle: [u8; HANDLE_BYTES]) -> Result<Event, Fault> {
    let _current = context.enter()?;
    let handle = sys::CUipcEventHandle { reserved: handle.map(|byte| byte as i8) };
    let mut raw = null_mut();
    // SAFETY: the driver checks a handle, whatever bytes a peer sent; `Event` destroys it.
    unsafe { call!(cuIpcOpenEventHandle(&mut raw, handle))? };
    Ok(Event::adopt(context, raw))
}
