"""Postings are vacuumed after every ten thousand new ones, not after a fifth of the table: balances are then read from their index alone.

Nothing is ever dead in it, so a run looks at the new pages only. Until it has, PostgreSQL thinks an index that it would have to look
past dearer than it is, and might read the whole table.
"""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("payouts", "0019_event_sweeps")]

    operations = [
        migrations.RunSQL(
            """
ALTER TABLE payouts_posting SET (autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 10000)
""",
            "ALTER TABLE payouts_posting RESET (autovacuum_vacuum_insert_scale_factor, autovacuum_vacuum_insert_threshold)",
        ),
    ]
