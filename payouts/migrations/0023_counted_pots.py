"""A pot whose payees its result gives nothing is divided by count, and says so."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("attribution", "0006_influence_index"),
        ("marketplace", "0009_licenses_in_arrears"),
        ("payouts", "0022_currencies_by_statement"),
    ]

    operations = [
        migrations.AddField(
            model_name="division",
            name="counted_role",
            field=models.CharField(blank=True, default="", max_length=13),
        ),
        migrations.AddConstraint(
            model_name="division",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    ("counted_role", ""),
                    models.Q(("counted_role__in", ["rights_holder", "labeller"]), ("result__isnull", False)),
                    _connector="OR",
                ),
                name="one_pot_is_counted_beside_a_measured_one",
            ),
        ),
    ]
