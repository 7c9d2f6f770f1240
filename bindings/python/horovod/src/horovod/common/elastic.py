"""Elastic training."""

from carole._elastic import (
    HostUpdateResult,
    NotificationManager,
    ObjectState,
    State,
    notification_manager,
    run_fn,
)

__all__ = ["HostUpdateResult", "NotificationManager", "ObjectState", "State", "notification_manager", "run_fn"]
