"""Clients that send something else than they should, for tests of a run."""

from fedmezo_jax.run import loop, messages


def intercepted(monkeypatch, rounds, change):
    """Lets ``change(client, message)`` take the place of what clients send in these rounds."""
    run_round = loop.rounds.run_round

    def run(config, t, sizes, typical, work, like, *rest):
        def changed(attempt, limit):
            answers = work(attempt, limit)
            if t not in rounds:
                return answers
            messages = [change(int(id), m) for id, m in zip(answers.ids, answers.messages, strict=True)]
            return answers._replace(messages=messages)

        return run_round(config, t, sizes, typical, changed, like, *rest)

    monkeypatch.setattr(loop.rounds, "run_round", run)


def altered(message, **changes):
    """The message with fields of its update replaced by what functions make of them."""
    update = messages.unpack_update(message.update)
    update = update._replace(**{name: change(getattr(update, name)) for name, change in changes.items()})
    return message._replace(update=messages.pack_update(update))
