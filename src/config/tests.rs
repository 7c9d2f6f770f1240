use super::*;
use std::collections::{HashMap, HashSet};

fn load(variables: &[(&str, &str)]) -> Result<(Config, Vec<Warning>)> {
    load_over(&[], variables)
}

fn load_over(overrides: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<(Config, Vec<Warning>)> {
    let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
    };
    Config::load(&own(overrides), own(variables).into_iter())
}

fn error(variables: &[(&str, &str)]) -> String {
    let error = load(variables).expect_err("this must be refused");
    assert!(matches!(error, Error::Usage(_)));
    error.to_string()
}

#[test]
fn defaults_are_the_documented_ones_and_show_as_themselves() {
    let (config, warnings) = load(&[]).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(config.fusion_bytes, 64 << 20);
    assert_eq!(config.timeout_ms, crate::limits::SILENCE_MS);
    assert_eq!((config.stall_warn_s, config.stall_fail_s, config.batch_window_us), (60, 0, 100));
    assert_eq!((config.rank, config.algorithm), (None, None));
    for knob in KNOBS {
        assert_eq!(config.show(knob.field), knob.default, "{}", knob.name);
        assert_eq!(config.origin(knob.name).to_string(), "default");
    }
}

#[test]
fn names_are_unique_and_well_formed() {
    let mut seen = HashSet::new();
    for knob in KNOBS {
        assert!(knob.name.starts_with("CAROLE_"), "{}", knob.name);
        for name in knob.aliases.iter().map(|(alias, _)| *alias).chain([knob.name, knob.field]) {
            assert!(seen.insert(name), "{name} appears twice");
        }
        for (alias, _) in knob.aliases {
            assert!(!horovod::WITHOUT_EFFECT.iter().any(|(name, _)| name == alias));
        }
    }
}

#[test]
fn precedence_goes_from_argument_to_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("knobs");
    std::fs::write(&path, "fusion_bytes = 1M\ntcp_lanes = 7\n# a comment\nCAROLE_SPIN_US=3\n").unwrap();
    let file = ("CAROLE_CONFIG_FILE", path.to_str().unwrap());
    let fusion = |config: &Config| config.fusion_bytes;

    let (config, _) = load(&[file]).unwrap();
    assert_eq!((fusion(&config), config.tcp_lanes, config.spin_us), (1 << 20, 7, 3));
    assert_eq!(config.origin("tcp_lanes").to_string(), format!("{}:2", path.display()));

    let horovod = ("HOROVOD_FUSION_THRESHOLD", "2097152");
    let (config, _) = load(&[file, horovod]).unwrap();
    assert_eq!(fusion(&config), 2 << 20);
    assert_eq!(config.origin("fusion_bytes").to_string(), "HOROVOD_FUSION_THRESHOLD");

    let carole = ("CAROLE_FUSION_BYTES", "3M");
    for variables in [[file, horovod, carole], [carole, horovod, file]] {
        let (config, _) = load(&variables).unwrap();
        assert_eq!(fusion(&config), 3 << 20);
    }

    let flags = [("CAROLE_FUSION_BYTES".to_string(), "4M".to_string(), "--fusion-threshold-mb".to_string())];
    let environment = || [(carole.0.to_string(), carole.1.to_string())].into_iter();
    let (config, _) = Config::load_with_flags(&[], &flags, environment()).unwrap();
    assert_eq!(fusion(&config), 4 << 20);
    assert_eq!(config.origin("fusion_bytes").to_string(), "--fusion-threshold-mb");

    let argument = [("fusion_bytes".to_string(), "5M".to_string())];
    let (config, _) = Config::load_with_flags(&argument, &flags, environment()).unwrap();
    assert_eq!(fusion(&config), 5 << 20);
    assert_eq!(config.origin("fusion_bytes").to_string(), "init(fusion_bytes)");
}

#[test]
fn an_unknown_variable_warns_and_names_the_nearest() {
    let (_, warnings) =
        load(&[("CAROLE_ALGORITM", "ring"), ("CAROLE_TEST_X", "1"), ("PATH", "/bin")]).unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].message.contains("CAROLE_ALGORITM"), "{}", warnings[0].message);
    assert!(warnings[0].message.contains("did you mean CAROLE_ALGORITHM?"), "{}", warnings[0].message);
    let words = error(&[("CAROLE_ALGORITM", "ring"), ("CAROLE_STRICT_ENV", "1")]);
    assert!(words.contains("CAROLE_ALGORITHM") && words.contains("CAROLE_STRICT_ENV"), "{words}");
    // The value of an unknown variable may be a secret.
    let (_, warnings) = load(&[("CAROLE_SECRET", "hunter2")]).unwrap();
    assert!(!warnings[0].message.contains("hunter2"));
    assert!(load_over(&[("algorithmus", "ring")], &[]).is_err());
}

#[test]
fn a_bad_value_is_an_error_that_names_variable_value_and_what_is_allowed() {
    for (name, text, allowed) in [
        ("CAROLE_TRANSPORT", "udp", "auto, shm, tcp"),
        #[cfg(not(feature = "mpi"))]
        ("CAROLE_TRANSPORT", "mpi", "no MPI"),
        ("CAROLE_ALGORITHM", "rings", "ring, tree, doubling, direct, hierarchical"),
        ("CAROLE_TCP_LANES", "0", "from 1 to 16"),
        ("CAROLE_TCP_LANES", "17", "from 1 to 16"),
        ("CAROLE_TIMEOUT_MS", "-1", "a whole number"),
        ("CAROLE_FUSION_BYTES", "64Q", "suffixes"),
        ("CAROLE_DETERMINISTIC", "maybe", "true"),
        ("CAROLE_RANK", "99999999999", "from 0 to 65535"),
    ] {
        let words = error(&[(name, text), ("CAROLE_SIZE", "1")]);
        assert!(words.contains(name) && words.contains(text) && words.contains(allowed), "{words}");
    }
    let words = error(&[("HOROVOD_CYCLE_TIME", "soon")]);
    assert!(words.contains("HOROVOD_CYCLE_TIME") && words.contains("CAROLE_BATCH_WINDOW_US"), "{words}");
}

#[test]
fn horovod_variables_are_translated() {
    let (config, warnings) = load(&[
        ("HOROVOD_CYCLE_TIME", "2.5"),
        ("HOROVOD_STALL_CHECK_TIME_SECONDS", "30"),
        ("HOROVOD_STALL_CHECK_DISABLE", "1"),
        ("HOROVOD_LOG_LEVEL", "WARNING"),
        ("HOROVOD_LOG_HIDE_TIME", "0"),
        ("HOROVOD_THREAD_AFFINITY", "0,2, 4"),
        ("HOROVOD_NUM_NCCL_STREAMS", "2"),
        ("HOROVOD_SOMETHING_NEW", "2"),
    ])
    .unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!((config.batch_window_us, config.stall_warn_s), (2500, 0));
    assert_eq!(config.log_level, LogLevel::Warning);
    assert!(config.log_timestamps);
    assert_eq!(config.thread_affinity, [0, 2, 4]);
    let (config, _) =
        load(&[("HOROVOD_STALL_CHECK_TIME_SECONDS", "30"), ("HOROVOD_STALL_CHECK_DISABLE", "0")]).unwrap();
    assert_eq!(config.stall_warn_s, 30);
    let (_, warnings) = load(&[("HOROVOD_AUTOTUNE", "1"), ("HOROVOD_TIMELINE", "/tmp/t.json")]).unwrap();
    assert_eq!(warnings.len(), 2);
    assert!(load(&[("HOROVOD_AUTOTUNE", "0")]).unwrap().1.is_empty());
}

#[test]
fn an_identity_is_whole_or_absent() {
    let words = error(&[("CAROLE_RANK", "0")]);
    assert!(words.contains("CAROLE_SIZE is not"), "{words}");
    let words = error(&[("HOROVOD_SIZE", "4")]);
    assert!(words.contains("HOROVOD_SIZE") && words.contains("CAROLE_RANK is not"), "{words}");
    let words = error(&[("CAROLE_RANK", "4"), ("CAROLE_SIZE", "4")]);
    assert!(words.contains("0 to 3"), "{words}");
    let (config, _) = load(&[("HOROVOD_RANK", "3"), ("HOROVOD_SIZE", "4")]).unwrap();
    assert_eq!((config.rank, config.size), (Some(3), Some(4)));
}

#[test]
fn torchrun_counts_only_whole_and_only_when_nothing_else_speaks() {
    let torchrun =
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1"), ("LOCAL_RANK", "1")];
    let (config, _) = load(&[&torchrun[..], &[("LOCAL_WORLD_SIZE", "2")]].concat()).unwrap();
    assert_eq!((config.rank, config.size, config.local_rank), (Some(1), Some(2), Some(1)));
    assert_eq!(config.origin("rank").to_string(), "RANK");
    let (config, _) = load(&torchrun[..2]).unwrap();
    assert_eq!(config.rank, None);
    let ours = [("CAROLE_RANK", "0"), ("CAROLE_SIZE", "1")];
    let (config, _) = load(&[&torchrun[..], &ours[..]].concat()).unwrap();
    assert_eq!((config.rank, config.size, config.local_rank), (Some(0), Some(1), None));
}

#[test]
fn horovodrun_yaml_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let yaml = "---\ncontroller: false\nparams:\n  fusion_threshold_mb: 32 # half\n  cycle_time_ms: 0.5\n\
                stall_check:\n  enabled: false\n  warning_time_seconds: 120\nlogging:\n  level: \"DEBUG\"\n\
                autotune:\n    enabled: true\n";
    std::fs::write(&path, yaml).unwrap();
    let (config, warnings) = load(&[("CAROLE_CONFIG_FILE", path.to_str().unwrap())]).unwrap();
    assert_eq!((config.fusion_bytes, config.batch_window_us, config.stall_warn_s), (32 << 20, 500, 0));
    assert_eq!(config.log_level, LogLevel::Debug);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].message.contains("autotune.enabled"), "{warnings:?}");
}

#[test]
fn a_bad_file_is_an_error_that_names_the_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("knobs");
    for (text, expected) in [
        ("\nnonsense\n", "line 2, column 9"),
        ("tcp_lanes = [3]\n", "line 1, column 13"),
        ("job = \"a\n", "line 1, column 7: the quotation mark"),
        ("tcp lanes = 3\n", "line 1, column 4"),
        ("tcp_lane = 3\n", "'tcp_lanes'"),
        ("tcp_lanes = many\n", "knobs:1"),
        ("tcp_lanes = 3\ntcp_lanes = 4\n", "twice"),
        ("params:\n  fusion_threshold_mb: x\n", "CAROLE_FUSION_BYTES"),
    ] {
        std::fs::write(&path, text).unwrap();
        let words = error(&[("CAROLE_CONFIG_FILE", path.to_str().unwrap())]);
        assert!(words.contains(expected), "{words}");
    }
    assert!(error(&[("CAROLE_CONFIG_FILE", "/does/not/exist")]).contains("/does/not/exist"));
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(error(&[("CAROLE_CONFIG_FILE", path.to_str().unwrap())]).contains("cannot be read"));
}

#[test]
fn sizes_take_suffixes() {
    for (text, bytes) in
        [("0", 0), ("4096", 4096), ("64M", 64 << 20), ("1GiB", 1 << 30), ("2 kb", 2048), ("0.5g", 1 << 29)]
    {
        assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
    }
    for text in ["", "M", "1X", "-1", "1e9", "99999999999999999999", "16777216T", "1.2.3", "0x10"] {
        assert!(parse_bytes(text).is_err(), "{text}");
    }
    assert_eq!(show_bytes(64 << 20), "64M");
    assert_eq!(show_bytes(1000), "1000");
}

#[test]
fn the_manual_and_the_table_name_every_knob() {
    let (config, _) = load(&[("CAROLE_ALGORITHM", "tree")]).unwrap();
    let (manual, table) = (manual(), config.print_config());
    for knob in KNOBS {
        assert!(manual.contains(knob.name) && table.contains(knob.name), "{}", knob.name);
    }
    let row = table.lines().find(|line| line.starts_with("CAROLE_ALGORITHM")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["CAROLE_ALGORITHM", "tree", "CAROLE_ALGORITHM"]);
    assert!(config.agreed().contains(&("CAROLE_ALGORITHM", "tree".to_string())));
    assert!(!config.agreed().iter().any(|(name, _)| *name == "CAROLE_RANK"));
}

proptest::proptest! {
    #[test]
    fn no_file_and_no_value_panics(text in "\\PC{0,200}", name in "[A-Z_]{1,12}") {
        let _ = file::parse(&text);
        let _ = load(&[(&format!("CAROLE_{name}"), &text), ("HOROVOD_CYCLE_TIME", &text)]);
    }
}

#[test]
fn what_is_settled_is_what_any_source_said_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("knobs");
    std::fs::write(&path, "secret_file = /a/secret\njob = of the file\n").unwrap();
    let variables = [
        ("CAROLE_CONFIG_FILE", path.to_str().unwrap()),
        ("CAROLE_JOB", "of the variable"),
        ("CAROLE_HOST_ID", "auto"),
        ("HOROVOD_RANK", "1"),
        ("HOROVOD_SIZE", "2"),
        ("CAROLE_SECRET_FD", ""),
    ];
    let (config, _) = load_over(&[("rendezvous", "tcp://a:1,b:2")], &variables).unwrap();
    let settled: HashMap<&str, Option<String>> = config.settled().collect();
    let said = |name: &str| settled[name].as_deref();
    assert_eq!(said("CAROLE_RENDEZVOUS"), Some("tcp://a:1,b:2"));
    assert_eq!(said("CAROLE_SECRET_FILE"), Some("/a/secret"));
    assert_eq!(said("CAROLE_JOB"), Some("of the variable"));
    assert_eq!((said("CAROLE_RANK"), said("CAROLE_SIZE")), (Some("1"), Some("2")));
    assert_eq!(
        (said("CAROLE_HOST_ID"), said("CAROLE_SECRET_FD"), said("CAROLE_INSECURE")),
        (None, None, None)
    );

    let torch = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "7")];
    let (config, _) = load(&torch).unwrap();
    assert_eq!(config.rank, Some(1));
    assert!(config.settled().all(|(_, text)| text.is_none()));
}
