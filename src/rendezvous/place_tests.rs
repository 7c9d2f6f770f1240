use super::*;

fn environment(text: &str) -> Environment {
    text.split_whitespace()
        .map(|pair| pair.split_once('=').unwrap())
        .map(|(k, v)| (k.into(), v.into()))
        .collect()
}

fn place(text: &str) -> Result<Place> {
    Place::read(&environment(text))
}

fn meeting(text: &str, secret: bool) -> std::result::Result<Meeting, String> {
    let environment = environment(text);
    let place = Place::read(&environment).unwrap();
    Meeting::read(&environment, &place, secret, 42).map_err(|e| e.to_string())
}

#[test]
fn every_family_is_read() {
    for (text, origin) in [
        ("CAROLE_RANK=1 CAROLE_SIZE=4 CAROLE_LOCAL_RANK=1 CAROLE_LOCAL_SIZE=2", "carolerun"),
        ("HOROVOD_RANK=1 HOROVOD_SIZE=4 HOROVOD_LOCAL_RANK=1 HOROVOD_LOCAL_SIZE=2", "Horovod"),
        ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", "torchrun"),
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
            "Open MPI",
        ),
        ("PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", "PMI"),
        (
            "MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2",
            "MVAPICH",
        ),
        (
            "SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_STEP_TASKS_PER_NODE=2",
            "Slurm",
        ),
    ] {
        let hints = Hints { local_rank: Some(1), local_size: Some(2), ..Hints::default() };
        assert_eq!(place(text).unwrap(), Place { rank: 1, size: 4, hints, origin });
    }
}

#[test]
fn precedence_and_what_does_not_count() {
    let all = "CAROLE_RANK=0 CAROLE_SIZE=1 HOROVOD_RANK=1 HOROVOD_SIZE=2 RANK=2 WORLD_SIZE=3";
    assert_eq!(place(all).unwrap().origin, "carolerun");
    assert_eq!(place("RANK=2 WORLD_SIZE=3 PMI_RANK=0 PMI_SIZE=1").unwrap().origin, "torchrun");
    // An sbatch shell, and Open MPI's PMIx without a size.
    assert_eq!(place("SLURM_PROCID=3 SLURM_NTASKS=8 PMIX_RANK=2").unwrap().size, 1);
    assert_eq!(place("LOCAL_RANK=3").unwrap().size, 1);
    assert_eq!(place("").unwrap().size, 1);
}

#[test]
fn an_incomplete_set_names_the_missing_one() {
    for (text, there, missing) in [
        ("CAROLE_RANK=1", "CAROLE_RANK", "CAROLE_SIZE is not"),
        ("CAROLE_SIZE=2", "CAROLE_SIZE", "CAROLE_RANK is not"),
        ("CAROLE_LOCAL_RANK=1", "CAROLE_LOCAL_RANK", "CAROLE_RANK is not"),
        ("HOROVOD_RANK=1", "HOROVOD_RANK", "HOROVOD_SIZE is not"),
        ("WORLD_SIZE=2", "WORLD_SIZE", "RANK is not"),
        ("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE is not"),
        ("SLURM_STEP_ID=1 SLURM_PROCID=0", "SLURM_PROCID", "SLURM_NTASKS is not"),
    ] {
        let error = place(text).unwrap_err().to_string();
        assert!(error.contains(there) && error.contains(missing), "{error}");
    }
}

#[test]
fn values_that_cannot_be_are_refused_with_name_and_value() {
    for text in [
        "CAROLE_RANK=4 CAROLE_SIZE=4",
        "CAROLE_RANK=0 CAROLE_SIZE=0",
        "CAROLE_RANK=-1 CAROLE_SIZE=4",
        "CAROLE_RANK=+1 CAROLE_SIZE=4",
        "CAROLE_RANK= CAROLE_SIZE=4",
        "CAROLE_RANK=one CAROLE_SIZE=4",
        "CAROLE_RANK=0 CAROLE_SIZE=99999999999",
        "CAROLE_RANK=0 CAROLE_SIZE=65537",
        "CAROLE_RANK=0 CAROLE_SIZE=4 CAROLE_LOCAL_RANK=2 CAROLE_LOCAL_SIZE=2",
        "CAROLE_RANK=0 CAROLE_SIZE=4 CAROLE_LOCAL_SIZE=5",
        "CAROLE_RANK=0 CAROLE_SIZE=4 CAROLE_CROSS_RANK=0 CAROLE_CROSS_SIZE=0",
    ] {
        let error = place(text).unwrap_err().to_string();
        assert!(error.contains("CAROLE_") && error.contains('='), "{text}: {error}");
    }
}

const TWO: &str = "CAROLE_RANK=0 CAROLE_SIZE=2 ";
const APART: &str = "CAROLE_RANK=0 CAROLE_SIZE=2 CAROLE_LOCAL_RANK=0 CAROLE_LOCAL_SIZE=1 ";

#[test]
fn how_ranks_meet() {
    let two = |more: &str, secret| meeting(&format!("{TWO}{more}"), secret).unwrap();
    assert_eq!(meeting("", false), Ok(Meeting::Alone));
    assert_eq!(two("", false), Meeting::Private("parent-42".into()));
    assert_eq!(two("CAROLE_JOB=x", false), Meeting::Private("x".into()));
    assert_eq!(two("MASTER_ADDR=h MASTER_PORT=7", false), Meeting::Private("port-7".into()));
    assert_eq!(two("CAROLE_RENDEZVOUS=h:7", true), Meeting::RankZero("h:7".into()));
    assert_eq!(two("CAROLE_RENDEZVOUS=[::1]:7", true), Meeting::RankZero("[::1]:7".into()));
    assert_eq!(two("CAROLE_RENDEZVOUS=127.0.0.1:7", false), Meeting::Private("127.0.0.1:7".into()));
    assert_eq!(
        two("CAROLE_RENDEZVOUS=tcp://h:7,i:8", true),
        Meeting::Service(vec!["h:7".into(), "i:8".into()])
    );
    assert_eq!(two("CAROLE_RENDEZVOUS=h:7 CAROLE_SECRET_FD=9", true), Meeting::Service(vec!["h:7".into()]));
    assert_eq!(two("CAROLE_RENDEZVOUS=file:///a/b", true), Meeting::File("/a/b".into()));
    assert_eq!(two("CAROLE_RENDEZVOUS=file:///a/b", false), Meeting::Private("/a/b".into()));
    assert_eq!(two("CAROLE_RENDEZVOUS=h:7 CAROLE_INSECURE=1", false), Meeting::RankZero("h:7".into()));
}

#[test]
fn how_ranks_on_several_hosts_meet() {
    let apart = |more: &str, secret| meeting(&format!("{APART}{more}"), secret);
    assert!(apart("", true).unwrap_err().contains("CAROLE_RENDEZVOUS is not set"));
    let torch = "MASTER_ADDR=h MASTER_PORT=29500 ";
    assert_eq!(apart(torch, true), Ok(Meeting::RankZero("h:29517".into())));
    assert_eq!(apart(&format!("{torch}CAROLE_RENDEZVOUS_PORT=5"), true), Ok(Meeting::RankZero("h:5".into())));
    assert_eq!(apart("MASTER_ADDR=fe::1 MASTER_PORT=1", true), Ok(Meeting::RankZero("[fe::1]:18".into())));
    assert!(apart("MASTER_ADDR=h", true).unwrap_err().contains("MASTER_PORT is not"));
    assert!(apart("MASTER_ADDR=h MASTER_PORT=65530", true).unwrap_err().contains("CAROLE_RENDEZVOUS_PORT"));
}

#[test]
fn off_loopback_without_a_secret_is_refused_with_the_remedy() {
    for text in ["CAROLE_RENDEZVOUS=10.0.0.1:7", "CAROLE_RENDEZVOUS=tcp://10.0.0.1:7"] {
        let error = meeting(&format!("{TWO}{text}"), false).unwrap_err();
        assert!(error.contains("CAROLE_SECRET_FILE") && error.contains("CAROLE_INSECURE=1"), "{error}");
    }
    for text in ["CAROLE_RENDEZVOUS=file:///a", "MASTER_ADDR=h MASTER_PORT=7"] {
        let error = meeting(&format!("{APART}{text}"), false).unwrap_err();
        assert!(error.contains("CAROLE_SECRET_FILE"), "{error}");
    }
}

#[test]
fn addresses_that_are_none_are_refused() {
    for text in
        ["host", ":7", "host:", "host:0", "host:70000", "::1:7", "[::1:7", "a:1,b:2", "file://relative"]
    {
        let error = meeting(&format!("{TWO}CAROLE_RENDEZVOUS={text}"), true).unwrap_err();
        assert!(error.contains("CAROLE_RENDEZVOUS"), "{text}: {error}");
    }
}

#[test]
fn slurms_list_of_tasks_is_read() {
    for (list, node, size) in [
        ("4", "0", Some(4)),
        ("4", "1", None),
        ("2(x3),1", "2", Some(2)),
        ("2(x3),1", "3", Some(1)),
        ("2(x3),1", "4", None),
        ("2(x", "0", None),
    ] {
        let text = format!("SLURM_STEP_ID=0 SLURM_STEP_TASKS_PER_NODE={list} SLURM_NODEID={node}");
        assert_eq!(tasks_on_this_node(&environment(&text)), size, "{text}");
        // srun's PMI says nothing of nodes.
        let text = format!("{text} PMI_RANK=0 PMI_SIZE=7 SLURM_PROCID=0 SLURM_LOCALID=0");
        let hints = Hints { local_rank: Some(0), local_size: size, ..Hints::default() };
        assert_eq!(place(&text).unwrap().hints, hints);
        // The tasks of the step may be another launcher's helpers, which started the ranks.
        let text = text.replace("PMI_RANK=0", "PMI_RANK=3");
        assert_eq!(place(&text).unwrap().hints, Hints::default());
    }
    assert_eq!(tasks_on_this_node(&environment("SLURM_STEP_TASKS_PER_NODE=4")), None, "not a step");
}

#[test]
fn a_named_job_on_several_hosts_meets_below_the_home() {
    let slurm = "SLURM_STEP_ID=3 SLURM_JOB_ID=77 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NODEID=0 \
                 SLURM_STEP_TASKS_PER_NODE=2(x2)";
    let found = meeting(&format!("{slurm} HOME=/users/ada"), false).unwrap();
    assert_eq!(found, Meeting::Shared(PathBuf::from("/users/ada/.carole/job-77.3")));
    let ompi = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2";
    let found = meeting(&format!("{ompi} PMIX_NAMESPACE=prterun-a@1 HOME=/users/ada"), false).unwrap();
    assert_eq!(found, Meeting::Shared(PathBuf::from("/users/ada/.carole/job-prterun-a_1")));
    // Without a name there is nothing to meet by.
    let words = meeting(&format!("{ompi} HOME=/users/ada"), false).unwrap_err();
    assert!(words.contains("CAROLE_RENDEZVOUS"), "{words}");
    assert!(place(ompi).unwrap().is_from_mpi() && place(ompi).unwrap().spans_hosts());
    assert!(!place(slurm).unwrap().is_from_mpi());
}
