//! Who this process is, as MPI knows it, and MPI as the way by which rank 0 tells the others where to meet.
#![forbid(unsafe_code)]

use super::client::Join;
use super::place::Place;
use crate::error::{Error, Result};
use crate::transport::mpi::{self, Threads};
use std::sync::Arc;
use std::time::Duration;

/// Fills in what MPI knows. `forced`: MPI is the transport, so that MPI's ranks are the ranks; otherwise it is only
/// asked where ranks on several hosts would have no way to find each other. `window`: this rank's payload within its host
/// goes through memory that MPI lets ranks share.
pub fn complete(join: &mut Join, forced: bool, threads: Threads, window: bool) -> Result<()> {
    let told = Place::read(&join.environment)?;
    let alone = told.is_from_mpi() && told.spans_hosts() && join.announce.is_none();
    if !forced && !alone {
        return Ok(());
    }
    if join.environment.get("CAROLE_RENDEZVOUS").is_some_and(|text| !text.is_empty()) && !forced {
        return Ok(());
    }
    let limit = Duration::from_millis(join.start_timeout_ms);
    let world = mpi::join(threads, limit)?;
    let place = agree(&told, world.rank(), world.size())?;
    if forced {
        world.share(window, limit)?;
    }
    if place.size > 1 {
        join.announce = Some(Arc::new(move |words| world.tell(words, limit)));
    }
    join.place = Some(place);
    Ok(())
}

/// MPI's ranks, with what the variables say about hosts. They must not contradict each other.
fn agree(told: &Place, rank: u32, size: u32) -> Result<Place> {
    if told.is_alone_by_default() || (told.rank, told.size) == (rank, size) {
        return Ok(Place { rank, size, hints: told.hints, origin: "MPI" });
    }
    let library = mpi::library();
    Err(Error::usage(match size {
        1 => format!(
            "the variables of {} say rank {} of {}, but to {library}, with which Carole was built, this process is \
             alone: it was started by another MPI's launcher, or by none. Start the job by the mpirun of {library}, \
             or build Carole with the other MPI",
            told.origin, told.rank, told.size
        ),
        _ => format!(
            "the variables of {} say rank {} of {}, but {library} says rank {rank} of {size}; with \
             CAROLE_TRANSPORT=mpi the ranks are MPI's, so unset the variables",
            told.origin, told.rank, told.size
        ),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::place::Hints;

    #[test]
    fn variables_and_mpi_agree_or_the_difference_is_named() {
        let told = |rank, size, origin| Place { rank, size, hints: Hints::default(), origin };
        let alone = Place::read(&Default::default()).unwrap();
        assert_eq!(agree(&alone, 3, 4).unwrap(), told(3, 4, "MPI"));
        assert_eq!(agree(&told(3, 4, "PMI"), 3, 4).unwrap(), told(3, 4, "MPI"));
        let error = agree(&told(1, 4, "PMI"), 0, 1).unwrap_err().to_string();
        assert!(error.contains("PMI") && error.contains("another MPI's launcher"), "{error}");
        let error = agree(&told(1, 4, "carolerun"), 2, 4).unwrap_err().to_string();
        assert!(error.contains("carolerun") && error.contains("rank 2 of 4"), "{error}");
    }
}
