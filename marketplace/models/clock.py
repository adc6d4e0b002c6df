from django.db import models


class ClockOffset(models.Model):
    """How far the demo's business clock is ahead of the wall clock; one row at most."""

    seconds = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(pk=1), name="one_clock")]

    def __str__(self) -> str:
        return f"+{self.seconds} s"
