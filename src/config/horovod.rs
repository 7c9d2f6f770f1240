//! Horovod's variables: how those that have a meaning here are read, and which have none.

/// Turns the text of a Horovod variable into the text of a knob; `None` says nothing about the knob.
pub type Convert = fn(&str) -> Result<Option<String>, String>;

/// The same text.
pub(super) fn as_is(text: &str) -> Result<Option<String>, String> {
    // Horovod reads sizes and seconds with atoi and strtod; "64.0" is common in generated scripts.
    let whole = text.strip_suffix(".0").filter(|rest| rest.bytes().all(|b| b.is_ascii_digit()));
    Ok(Some(whole.unwrap_or(text).to_string()))
}

/// Milliseconds, perhaps with a fraction, to whole microseconds.
pub(super) fn milliseconds_to_us(text: &str) -> Result<Option<String>, String> {
    let ms = number(text)?;
    Ok(Some(format!("{}", (ms * 1000.0).round() as u64)))
}

/// Mebibytes, perhaps with a fraction, to bytes.
pub(super) fn mebibytes_to_bytes(text: &str) -> Result<Option<String>, String> {
    let mebibytes = number(text)?;
    Ok(Some(format!("{}", (mebibytes * (1u64 << 20) as f64).round() as u64)))
}

/// On means off.
pub(super) fn inverted(text: &str) -> Result<Option<String>, String> {
    Ok(Some(if switch(text)? { "0" } else { "1" }.to_string()))
}

/// On sets the knob to 0; off says nothing.
pub(super) fn zero_when_on(text: &str) -> Result<Option<String>, String> {
    Ok(switch(text)?.then(|| "0".to_string()))
}

/// Off sets the knob to 0; on says nothing.
pub(super) fn zero_when_off(text: &str) -> Result<Option<String>, String> {
    Ok((!switch(text)?).then(|| "0".to_string()))
}

fn number(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "it is not a number".to_string())?;
    if value.is_finite() && value >= 0.0 { Ok(value) } else { Err("it must be 0 or more".to_string()) }
}

fn switch(text: &str) -> Result<bool, String> {
    use super::value::{Kind, Switch};
    Switch::parse(text)
}

/// Horovod's variables whose feature does not exist here. The words, where there are any, are said once;
/// the others change nothing that a user could notice.
pub(super) const WITHOUT_EFFECT: &[(&str, Option<&str>)] = &[
    ("HOROVOD_AUTOTUNE", Some("autotuning does not exist in this version; the choice is made by price")),
    (
        "HOROVOD_TIMELINE",
        Some("the engine writes no timeline in this version; carole.torch writes one of its calls"),
    ),
    ("HOROVOD_ELASTIC", None),
    ("HOROVOD_TORUS_ALLREDUCE", Some("the torus allreduce needs NCCL, which Carole does not use")),
    (
        "HOROVOD_HIERARCHICAL_ALLREDUCE",
        Some("CAROLE_ALGORITHM=hierarchical forces it; otherwise price decides"),
    ),
    (
        "HOROVOD_HIERARCHICAL_ALLGATHER",
        Some("CAROLE_ALGORITHM=hierarchical forces it; otherwise price decides"),
    ),
    ("HOROVOD_AUTOTUNE_LOG", None),
    ("HOROVOD_AUTOTUNE_WARMUP_SAMPLES", None),
    ("HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE", None),
    ("HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES", None),
    ("HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE", None),
    ("HOROVOD_TIMELINE_MARK_CYCLES", None),
    ("HOROVOD_CONTROLLER", None),
    ("HOROVOD_CPU_OPERATIONS", None),
    ("HOROVOD_NUM_NCCL_STREAMS", None),
    ("HOROVOD_BATCH_D2D_MEMCOPIES", None),
    ("HOROVOD_DISABLE_GROUP_FUSION", None),
    ("HOROVOD_ENABLE_ASYNC_COMPLETION", None),
    ("HOROVOD_ENABLE_XLA_OPS", None),
    ("HOROVOD_DISABLE_NVTX_RANGES", None),
    ("HOROVOD_DYNAMIC_PROCESS_SETS", None),
    ("HOROVOD_ADASUM_MPI_CHUNK_SIZE", None),
    ("HOROVOD_CCL_CACHE", None),
    ("HOROVOD_GLOO_RENDEZVOUS_ADDR", None),
    ("HOROVOD_GLOO_RENDEZVOUS_PORT", None),
    ("HOROVOD_HOSTNAME", None),
    ("HOROVOD_SPARK_START_TIMEOUT", None),
    ("HOROVOD_SPARK_PYTHONPATH", None),
    ("HOROVOD_SPARK_WORK_DIR", None),
    ("HOROVOD_SPARK_USE_LOCAL_RANK_GPU_INDEX", None),
];
