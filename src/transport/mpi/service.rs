//! The thread that initialises and finalises MPI, and that makes all calls where only one thread may.
#![forbid(unsafe_code)]

use super::port::Port;
use super::world::World;
use crate::error::Cause;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use mpi::environment::Universe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The naps of the thread, where it makes the calls: they grow as long as nothing moves.
const NAP_MIN: Duration = Duration::from_micros(20);
const NAP_MAX: Duration = Duration::from_millis(1);
/// Looks without a nap after something has moved.
const LOOKS: u32 = 200;

type Task = Box<dyn FnOnce(&mut Option<Universe>) + Send>;

enum Job {
    Do(Task),
    /// A port to look after.
    Adopt(Arc<Mutex<Port>>, Sender<Result<(), Cause>>),
    /// The ports have something to do.
    Look,
    /// From here on there may be ports.
    Serve(&'static World),
}

/// The thread, as others see it.
pub struct Service {
    jobs: Sender<Job>,
    asleep: Arc<AtomicBool>,
}

impl Service {
    /// Starts the thread, which lives as long as the process.
    pub fn start() -> std::io::Result<Service> {
        // As many as callers, each of which waits for its own.
        let (jobs, todo) = unbounded();
        let asleep = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&asleep);
        std::thread::Builder::new().name("carole-mpi".into()).spawn(move || run(&todo, &flag))?;
        Ok(Service { jobs, asleep })
    }

    /// Does something on the thread, and waits for it.
    pub fn run<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Option<Universe>) -> T + Send + 'static,
    ) -> T {
        let (answer, answered) = bounded(1);
        let task: Task = Box::new(move |ours| {
            // Whoever asked waits.
            let _ = answer.send(task(ours));
        });
        self.jobs.send(Job::Do(task)).expect("the thread lives as long as the process");
        answered.recv().expect("the thread answers, or has panicked")
    }

    /// Tells the thread of the world that its ports belong to.
    pub fn serve(&self, world: &'static World) {
        let _ = self.jobs.send(Job::Serve(world));
    }

    /// Opens a port, and looks after it from now on.
    pub fn adopt(&self, port: &Arc<Mutex<Port>>) -> Result<(), Cause> {
        let (answer, answered) = bounded(1);
        let gone = |_| Cause::System("the thread that calls MPI has ended".into());
        self.jobs.send(Job::Adopt(Arc::clone(port), answer)).map_err(|_| gone(()))?;
        answered.recv().unwrap_or_else(|_| Err(gone(())))
    }

    /// There is something to do for the ports.
    pub fn look(&self) {
        // One word is enough, however many have something to say.
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = self.jobs.send(Job::Look);
        }
    }
}

fn run(todo: &Receiver<Job>, asleep: &AtomicBool) {
    let mut ours = None;
    let mut world: Option<&'static World> = None;
    let mut ports: Vec<Arc<Mutex<Port>>> = Vec::new();
    let (mut idle, mut nap) = (0, NAP_MIN);
    loop {
        let moved = match world {
            Some(world) if !ports.is_empty() => turn(world, &mut ports),
            _ => false,
        };
        (idle, nap) = if moved { (0, NAP_MIN) } else { (idle + 1, nap) };
        let job = if moved || (idle < LOOKS && !ports.is_empty()) {
            std::thread::yield_now();
            todo.try_recv().ok()
        } else {
            asleep.store(true, Ordering::SeqCst);
            // What was left before the flag was seen is found at the end of a nap.
            let job = if ports.is_empty() {
                todo.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                todo.recv_timeout(nap)
            };
            asleep.store(false, Ordering::SeqCst);
            nap = (nap * 2).min(NAP_MAX);
            match job {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        };
        match job {
            None => {}
            Some(Job::Look) => (idle, nap) = (0, NAP_MIN),
            Some(Job::Serve(of)) => world = Some(of),
            Some(Job::Do(task)) => {
                // What was closed before is closed for whoever asks.
                if let Some(world) = world.filter(|_| !ports.is_empty()) {
                    turn(world, &mut ports);
                }
                task(&mut ours);
            }
            Some(Job::Adopt(port, answer)) => {
                let opened = port.lock().unwrap_or_else(PoisonError::into_inner).open();
                ports.push(port);
                let _ = answer.send(opened);
            }
        }
    }
}

/// Moves what can be moved for all ports, and lets go of those that are closed.
fn turn(world: &World, ports: &mut Vec<Arc<Mutex<Port>>>) -> bool {
    let _turn = world.turn();
    let mut moved = false;
    ports.retain(|port| {
        let mut open = port.lock().unwrap_or_else(PoisonError::into_inner);
        moved |= open.pump();
        let closed = open.closed.is_some();
        drop(open);
        if closed {
            world.close(port);
        }
        !closed
    });
    world.tend_closing();
    moved
}
