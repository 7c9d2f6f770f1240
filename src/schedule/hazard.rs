//! What a step must wait for follows from the memory that it shares with earlier steps. The work is linear in
//! the chunks that the steps touch: each chunk of memory remembers its last writer and the readers since.
#![forbid(unsafe_code)]

use super::{Space, Span, Step, Verb};

const NOBODY: u32 = u32::MAX;

#[derive(Clone)]
struct Cell {
    writer: u32,
    readers: Vec<u32>,
}

/// Steps, with their dependencies derived as they are pushed.
pub(super) struct Hazards {
    chunks: u32,
    aliased: bool,
    cells: Vec<Cell>,
    pub(super) steps: Vec<Step>,
    pub(super) dependencies: Vec<u32>,
}

impl Hazards {
    pub(super) fn new(chunks: u32, aliased: bool) -> Hazards {
        Hazards { chunks, aliased, cells: vec![], steps: vec![], dependencies: vec![] }
    }

    /// Appends a step. It waits for the writers of what it reads (RAW), and for the readers, or else the
    /// writer, of what it writes (WAR, WAW). Readers themselves wait for the writer, so one of both is enough.
    pub(super) fn push(&mut self, verb: Verb) {
        let step = self.steps.len() as u32;
        let first = self.dependencies.len();
        for span in verb.reads() {
            for cell in self.place(span) {
                let writer = self.cells[cell].writer;
                self.depend(first, writer);
            }
        }
        if let Some(span) = verb.writes() {
            for cell in self.place(span) {
                if self.cells[cell].readers.is_empty() {
                    let writer = self.cells[cell].writer;
                    self.depend(first, writer);
                }
                self.dependencies.extend_from_slice(&self.cells[cell].readers);
            }
        }
        let mut mine = self.dependencies.split_off(first);
        mine.sort_unstable();
        mine.dedup();
        self.dependencies.append(&mut mine);
        self.record(step, &verb);
        self.steps.push(Step { verb, after: first as u32..self.dependencies.len() as u32 });
    }

    fn record(&mut self, step: u32, verb: &Verb) {
        for span in verb.reads() {
            for cell in self.place(span) {
                self.cells[cell].readers.push(step);
            }
        }
        if let Some(span) = verb.writes() {
            for cell in self.place(span) {
                self.cells[cell].writer = step;
                self.cells[cell].readers.clear();
            }
        }
    }

    fn depend(&mut self, first: usize, on: u32) {
        if on != NOBODY && self.dependencies[first..].last() != Some(&on) {
            self.dependencies.push(on);
        }
    }

    /// The cells of a span; the table grows to hold them.
    fn place(&mut self, span: &Span) -> std::ops::Range<usize> {
        let base = match span.space {
            Space::Input => 0,
            Space::Output if self.aliased => 0,
            Space::Output => self.chunks as usize,
            Space::Scratch => 2 * self.chunks as usize,
        };
        let range = base + span.chunks.start as usize..base + span.chunks.end as usize;
        if self.cells.len() < range.end {
            self.cells.resize(range.end, Cell { writer: NOBODY, readers: vec![] });
        }
        range
    }
}
