//! How workers are made: where they write to, and the variables that say who they are.
#![forbid(unsafe_code)]

use super::super::args::Arguments;
use super::super::guard::RankSpec;
use super::super::output::Stream;
use super::super::{copy_to_files, pipe, system};
use super::plan::Worker;
use super::sites::Variables;
use crate::config::{Config, Layer};
use crate::error::Result;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Makes workers.
pub struct Maker {
    timestamps: bool,
    plain: bool,
    folder: Option<PathBuf>,
    settings: Variables,
    /// Where those of this host find the rendezvous.
    rendezvous: String,
}

impl Maker {
    /// As the user wants them.
    pub fn new(arguments: &Arguments, config: &Config, rendezvous: String) -> Maker {
        let settings = config.set_by(Layer::Flag).into_iter();
        Maker {
            timestamps: arguments.output.prefix_output_with_timestamp,
            plain: arguments.plain_output,
            folder: arguments.output.output_filename.clone(),
            settings: settings.map(|(name, value)| (name.to_owned(), value)).collect(),
            rendezvous,
        }
    }

    /// The variables of a worker, without those that say where the rendezvous is.
    pub fn variables(&self, worker: Worker, host: &str) -> Variables {
        let mut variables = vec![
            ("CAROLE_WORKER".to_owned(), worker.to_string()),
            // Scripts that were written for Horovod read these.
            ("HOROVOD_ELASTIC".to_owned(), "1".to_owned()),
            ("HOROVOD_HOSTNAME".to_owned(), host.to_owned()),
        ];
        if std::env::var_os("PYTHONUNBUFFERED").is_none() {
            variables.push(("PYTHONUNBUFFERED".to_owned(), "1".to_owned()));
        }
        variables.extend(self.settings.iter().cloned());
        variables
    }

    fn prefix(&self, worker: Worker, name: &str) -> String {
        if self.plain { String::new() } else { format!("[worker {worker}]<{name}>:") }
    }

    fn copied(&self, mut pair: [Stream; 2], worker: Worker) -> Result<[Stream; 2]> {
        if let Some(folder) = &self.folder {
            copy_to_files(&mut pair, folder, worker as u32, 1)?;
        }
        Ok(pair)
    }

    /// The streams of a worker on another host.
    pub fn remote(&self, worker: Worker) -> Result<[Stream; 2]> {
        let pair =
            ["stdout", "stderr"].map(|name| Stream::remote(self.prefix(worker, name), self.timestamps));
        self.copied(pair, worker)
    }

    /// A worker on this host: what the guard is told, and its streams.
    pub fn local(&self, worker: Worker, host: &str) -> Result<(RankSpec, [Stream; 2])> {
        let (out_reader, stdout) = pipe()?;
        let (err_reader, stderr) = pipe()?;
        for end in [&out_reader, &err_reader] {
            rustix::io::ioctl_fionbio(end.as_fd(), true).map_err(|e| system(e.into()))?;
        }
        let stream = |end, name| Stream::new(end, self.prefix(worker, name), self.timestamps);
        let pair = self.copied([stream(out_reader, "stdout"), stream(err_reader, "stderr")], worker)?;
        let mut variables = self.variables(worker, host);
        variables.push(("CAROLE_RENDEZVOUS".to_owned(), self.rendezvous.clone()));
        Ok((RankSpec { variables, stdout, stderr }, pair))
    }
}
