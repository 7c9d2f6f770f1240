//! A pod of a Kubeflow TrainJob or PyTorchJob that runs its program as it is, without torchrun: the `PET_` variables,
//! which are meant for torchrun, say which pod of how many this is, and where the first one can be reached.
#![forbid(unsafe_code)]

use super::place::{Environment, Hints, Place};
use crate::error::{Error, Result};
use crate::limits::RANKS_MAX;

/// Who this pod is. Where it is to run several processes, only torchrun knows which of them this is.
///
/// # Errors
/// Numbers that cannot be, and several processes for each pod without torchrun.
pub fn place(environment: &Environment) -> Result<Option<Place>> {
    let text = |name: &str| environment.get(name).map(String::as_str);
    let number = |name: &str| text(name).and_then(|text| text.parse::<u32>().ok());
    // "2:4" is a range, for jobs that grow and shrink.
    let (Some(size), Some(rank)) = (number("PET_NNODES"), number("PET_NODE_RANK")) else { return Ok(None) };
    if size <= 1 && matches!(text("PET_NPROC_PER_NODE"), None | Some("1")) {
        return Ok(None);
    }
    if let Some(processes) = text("PET_NPROC_PER_NODE").filter(|text| *text != "1") {
        return Err(Error::usage(format!(
            "PET_NPROC_PER_NODE={processes}, but this program was not started by torchrun, which would say which of \
             the processes of its pod it is: start it by torchrun (it reads the PET_ variables), or set \
             PET_NPROC_PER_NODE=1"
        )));
    }
    if rank >= size || size as usize > RANKS_MAX {
        return Err(Error::usage(format!(
            "PET_NODE_RANK={rank} with PET_NNODES={size}: ranks count from 0 and stay below the size, which is at most \
             {RANKS_MAX}"
        )));
    }
    // Each pod is a host of its own.
    let hints =
        Hints { local_rank: Some(0), local_size: Some(1), cross_rank: Some(rank), cross_size: Some(size) };
    Ok(Some(Place { rank, size, hints, origin: "TrainJob" }))
}

/// The variables with torchrun's names for the first process's host and port, where only the `PET_` ones are set.
#[must_use]
pub fn with_master(environment: &Environment) -> Environment {
    let mut environment = environment.clone();
    for name in ["MASTER_ADDR", "MASTER_PORT"] {
        if let Some(value) = environment.get(&format!("PET_{name}")).cloned() {
            environment.entry(name.to_owned()).or_insert(value);
        }
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::place::Meeting;

    fn environment(text: &str) -> Environment {
        text.split(' ').filter_map(|pair| pair.split_once('=')).map(|(n, v)| (n.into(), v.into())).collect()
    }

    #[test]
    fn a_pod_is_a_rank_and_meets_at_the_first() {
        let pod = environment(
            "PET_NNODES=4 PET_NPROC_PER_NODE=1 PET_NODE_RANK=2 PET_MASTER_ADDR=a-0-0.a PET_MASTER_PORT=29500",
        );
        let place = Place::read(&pod).unwrap();
        assert_eq!((place.rank, place.size, place.origin), (2, 4, "TrainJob"));
        assert_eq!(Meeting::read(&pod, &place, true, 1).unwrap(), Meeting::RankZero("a-0-0.a:29517".into()));
        let words = Meeting::read(&pod, &place, false, 1).unwrap_err().to_string();
        assert!(words.contains("secret"), "{words}");
    }

    #[test]
    fn torchrun_goes_first_and_what_it_alone_knows_is_not_guessed() {
        let place = |text: &str| Place::read(&environment(text)).map(|place| (place.rank, place.size));
        let both = "PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=4 RANK=5 WORLD_SIZE=8";
        assert_eq!(place(both).unwrap(), (5, 8));
        for alone in ["PET_NNODES=1 PET_NODE_RANK=0", "PET_NNODES=2:4 PET_NODE_RANK=0", "PET_NNODES=2", ""] {
            assert_eq!(place(alone).unwrap(), (0, 1), "{alone}");
        }
        for (wrong, words) in [
            ("PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=auto", "start it by torchrun"),
            ("PET_NNODES=2 PET_NODE_RANK=2", "PET_NODE_RANK=2"),
        ] {
            assert!(place(wrong).unwrap_err().to_string().contains(words), "{wrong}");
        }
    }
}
