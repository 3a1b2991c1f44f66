"""A gated teacher in a plain PyTorch loop: no labels, no language model, no framework.

python examples/teacher_loop.py                                # a small classifier learns from the vote of itself and its teacher
python examples/teacher_loop.py --schedule ema                 # the same with an exponential moving average
"""

import argparse

import torch
from torch import nn

from mgrpo_kernels import Teacher, group_advantages, majority_vote
from mgrpo_kernels.method import teacher_agreement, top_answer_share
from mgrpo_kernels.teacher import SCHEDULES, Gate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--schedule", choices=SCHEDULES, default="gated", help="schedule of the teacher")
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()
P, N, M, CLASSES = 64, 4, 12, 8  # prompts per step; answers of the teacher and of the policy to each of them

torch.manual_seed(0)
centres = torch.randn(CLASSES, 16)


def draw(number):
    """Return points and their classes, which are used for the warm start and to measure the accuracy."""
    classes = torch.randint(CLASSES, (number,))
    return centres[classes] + 1.2 * torch.randn(number, 16), classes


model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, CLASSES))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
points, classes = draw(128)
for _ in range(100):  # warm start
    loss = nn.functional.cross_entropy(model(points), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
held_out, truth = draw(1000)

gate = Gate(least_agreement=0.6) if args.schedule == "gated" else None
teacher = Teacher(model, decay=0.95, schedule=args.schedule, every=5, gate=gate, most_votes=0.75)
for step in range(1, args.steps + 1):
    points, _ = draw(P)
    with torch.no_grad():
        own = torch.multinomial(model(points).softmax(-1), M, replacement=True)  # (P, M)
        with teacher.swapped_into(model):
            others = torch.multinomial(model(points).softmax(-1), N, replacement=True)  # (P, N)
    answers = torch.cat([own, others], 1)
    texts = [str(each) for each in answers.flatten().tolist()]
    by_teacher = (torch.arange(M + N) >= M).repeat(P)
    voters = by_teacher | (torch.arange(M + N) < teacher.policy_voters(M, N)).repeat(P)
    vote = majority_vote(texts, M + N, voters=voters, equivalence="exact")
    advantages = group_advantages(vote.agrees, M + N, mask=~by_teacher).view(P, -1)[:, :M]

    logprobs = model(points).log_softmax(-1).gather(1, own)
    loss = -(advantages * logprobs).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    metrics = {
        "vote_share": float(vote.share.mean()),
        "top_answer_share": top_answer_share(texts),
        "distinct_labels": len(set(vote.labels)) / P,
        "teacher_agreement": teacher_agreement(vote.cluster, M + N, by_teacher),
    }
    moved = teacher.advance(metrics)
    if step % 10 == 0:
        with torch.no_grad():
            accuracy = (model(held_out).argmax(-1) == truth).float().mean()
        state = "moved" if moved else "; ".join(teacher.waits_for) or f"frozen for {teacher.age} steps"
        print(
            f"step {step:3d}  accuracy {accuracy:.3f}  agreement {metrics['teacher_agreement']:.2f}  "
            f"teacher's votes {teacher.vote_share(M, N):.2f}  updates {teacher.updates:2d}  {state}"
        )
