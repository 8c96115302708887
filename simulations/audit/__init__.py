"""Privacy audits in three tiers; each can refute a claimed epsilon, none can prove it. See docs/auditing.md."""

from simulations.audit.mechanism import MechanismAudit, audit_mechanism
from simulations.audit.result import AuditResult, Verdict

__all__ = ["AuditResult", "MechanismAudit", "Verdict", "audit_mechanism"]
