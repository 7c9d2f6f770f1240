import importlib.util


def pytest_report_header(config):
    found = {name: importlib.util.find_spec(name) is not None for name in ("torch", "ml_dtypes")}
    missing = [name for name, present in found.items() if not present]
    return f"carole: SKIPPED for want of {', '.join(missing)}" if missing else "carole: torch and ml_dtypes are here"
