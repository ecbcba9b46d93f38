// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/preflight"
)

// CheckpointOptions say what to checkpoint, and how.
type CheckpointOptions struct {
	// Group, or Members (container ids), but not both.
	Group   string
	Members []string
	// Ref names the group's image.
	Ref string
	// Stop ends the members in the barrier.
	Stop bool
	// Timeout bounds the capture, during which the members stand still.
	Timeout time.Duration
	// Progress is told what is going on; may be nil.
	Progress func(what string)
}

// CheckpointResult is what "cohort checkpoint --json" prints; docs/cli.md has
// the schema. Times are milliseconds, sizes bytes.
type CheckpointResult struct {
	Group    string             `json:"group"`
	Ref      string             `json:"ref"`
	Epoch    string             `json:"epoch"`
	Number   uint64             `json:"epoch_number"`
	Digest   string             `json:"digest"`
	StopMS   float64            `json:"stop_ms"`
	SkewMS   float64            `json:"skew_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Members  []CheckpointMember `json:"members"`
	// Untold are calls that had to reach a member and did not; its lease does
	// what they would have done.
	Untold []group.Untold `json:"untold,omitempty"`
	// Preflight is what was found before; refusals end in an error.
	Preflight preflight.Report `json:"preflight"`
}

// CheckpointMember is one member's part of the result.
type CheckpointMember struct {
	ID           string  `json:"id"`
	Name         string  `json:"name"`
	StopMS       float64 `json:"stop_ms"`
	Processes    int     `json:"processes"`
	MemoryBytes  uint64  `json:"memory_bytes"`
	StorageBytes uint64  `json:"storage_bytes"`
	Image        string  `json:"image"`
	Digest       string  `json:"digest"`
	// PartsMS are the parts of the capture: scan, then criu beside pages, with
	// storage and tmpfs within criu.
	PartsMS map[string]float64 `json:"parts_ms"`
	Memory  MemoryResult       `json:"memory"`
}

// MemoryResult says how a member's memory was taken.
type MemoryResult struct {
	// Engine is "wp-async" where pages were copied while the member ran, or "full"
	// where all were dumped in the barrier; Why says why.
	Engine string `json:"engine"`
	Why    string `json:"why,omitempty"`
	// Rounds of pre-copy before the member was ready and until the freeze, the
	// bytes they read together, and why they ended.
	Rounds      uint32 `json:"rounds"`
	CopiedBytes uint64 `json:"copied_bytes"`
	End         string `json:"end,omitempty"`
	// BarrierBytes were dumped in the barrier, PrecopiedBytes before it.
	BarrierBytes   uint64 `json:"barrier_bytes"`
	PrecopiedBytes uint64 `json:"precopied_bytes"`
	// Untracked processes were dumped whole.
	Untracked uint32 `json:"untracked,omitempty"`
}

// RefusedError is a checkpoint that preflight refused; nothing was changed.
type RefusedError struct {
	Report preflight.Report
}

func (e *RefusedError) Error() string {
	n := 0
	var first string
	for _, f := range e.Report.Findings {
		if f.Severity == preflight.Refuse {
			if n == 0 {
				first = f.String()
			}
			n++
		}
	}
	if n == 1 {
		return "refused: " + first
	}
	return fmt.Sprintf("refused for %d reasons, the first: %s", n, first)
}

// noBarrier is set by tests only (see export_test.go and the build tag
// nobarrier): the negative control of the consistency tests.
var noBarrier = false

// Checkpoint takes a group through the barrier and makes its images. On error
// the members run as before, unless they were to be stopped and the barrier had
// been passed: the error says so then. The result is not nil once preflight has
// run.
func (h *Host) Checkpoint(ctx context.Context, o CheckpointOptions) (_ *CheckpointResult, retErr error) {
	step := o.Progress
	if step == nil {
		step = func(string) {}
	}
	ref, err := oci.NormalizeRef(o.Ref)
	if err != nil {
		return nil, err
	}
	step("looking for members")
	list, err := h.Members(ctx, o.Group, o.Members)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	res := &CheckpointResult{Group: o.Group, Ref: ref}
	if res.Group == "" {
		res.Group = groupName(ref)
	}
	report, err := h.preflight(ctx, list)
	res.Preflight = report
	if err != nil {
		return res, err
	}
	members := make([]*member, len(list))
	for i, c := range list {
		image, err := h.imageOf(ctx, c)
		if err != nil {
			return res, err
		}
		if _, err := oci.MemberRef(ref, c.Member); err != nil {
			return res, err
		}
		members[i] = &member{c: c, image: image}
	}
	if res.Number, err = h.nextNumber(ctx, res.Group); err != nil {
		return res, err
	}
	res.Epoch = newEpochID()
	// Whatever becomes of this process, containerd collects what it has not
	// named by then.
	ctx, done, err := h.Client.WithLease(ctx)
	if err != nil {
		return res, fmt.Errorf("take a lease in containerd: %w", err)
	}
	// A lease that cannot be given back ends by itself.
	defer func() { _ = done(context.WithoutCancel(ctx)) }()

	x := &exporter{h: h, members: members, res: res, info: oci.GroupInfo{Group: res.Group, Epoch: res.Epoch, EpochNumber: res.Number, Stopped: o.Stop}}
	seen := make([]group.Member, len(members))
	for i := range members {
		seen[i] = members[i]
	}
	cfg := group.Config{
		Epoch:     group.Epoch{ID: res.Epoch, Group: res.Group, Number: res.Number, Stop: o.Stop},
		Observer:  observer{step},
		NoBarrier: noBarrier,
	}
	cfg.Limits.Capture = o.Timeout
	out, err := group.Run(ctx, cfg, seen, x.run)
	res.StopMS, res.SkewMS, res.PhasesMS = out.StopMS, out.SkewMS, out.PhasesMS
	res.Untold = out.Untold
	for i, m := range out.Members {
		if i < len(res.Members) {
			res.Members[i].StopMS = m.StopMS
		}
	}
	if err != nil {
		return res, fmt.Errorf("checkpoint of group %s: %w", res.Group, err)
	}
	return res, nil
}

type observer struct{ step func(string) }

func (o observer) PhaseStarted(phase string)               { o.step(phase) }
func (o observer) PhaseEnded(string, time.Duration, error) {}

func newEpochID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// groupName makes a group's name for containers that were named one by one.
func groupName(ref string) string {
	name := ref[strings.LastIndexByte(ref, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	if name = notInName.ReplaceAllString(name, "-"); name == "" {
		return "members"
	}
	return name
}

// nextNumber counts a group's epochs by its images.
func (h *Host) nextNumber(ctx context.Context, name string) (uint64, error) {
	list, err := oci.ListGroups(ctx, h.Client.ImageService(), h.Client.ContentStore())
	if err != nil {
		return 0, fmt.Errorf("list checkpoint images: %w", err)
	}
	n := uint64(0)
	for _, l := range list {
		if l.Group.Name == name {
			n = max(n, l.Group.EpochNumber)
		}
	}
	return n + 1, nil
}

// imageOf looks up the image and the snapshot that a container was made from.
func (h *Host) imageOf(ctx context.Context, c *Container) (imageFacts, error) {
	img, err := h.Client.ImageService().Get(ctx, c.Info.Image)
	if errdefs.IsNotFound(err) {
		return imageFacts{}, fmt.Errorf("image %q of container %s is not here any more: pull it again, its layers are part of the checkpoint: %w", c.Info.Image, c.ID(), errdefs.ErrFailedPrecondition)
	} else if err != nil {
		return imageFacts{}, fmt.Errorf("look up the image of container %s: %w", c.ID(), err)
	}
	st, err := h.Client.SnapshotService(c.Info.Snapshotter).Stat(ctx, c.Info.SnapshotKey)
	if errdefs.IsUnavailable(err) {
		return imageFacts{}, fmt.Errorf("look up the snapshot of container %s: containerd cannot reach cohortd; is it running? %w", c.ID(), err)
	} else if err != nil {
		return imageFacts{}, fmt.Errorf("look up the snapshot of container %s: %w", c.ID(), err)
	}
	return imageFacts{ref: img.Name, digest: img.Target.Digest.String(), chainID: st.Parent, target: img.Target}, nil
}

// CheckResult is what "cohort check --json" prints.
type CheckResult struct {
	Group   string   `json:"group,omitempty"`
	Members []string `json:"members"`
	preflight.Report
}

// Check runs the preflight of a checkpoint alone.
func (h *Host) Check(ctx context.Context, groupName string, ids []string) (*CheckResult, error) {
	list, err := h.Members(ctx, groupName, ids)
	if err != nil {
		return nil, err
	}
	defer closeAll(list)
	res := &CheckResult{Group: groupName}
	for _, c := range list {
		res.Members = append(res.Members, c.ID())
	}
	res.Report, err = h.preflight(ctx, list)
	return res, err
}

// preflight inspects all members and refuses what would fail.
func (h *Host) preflight(ctx context.Context, list []*Container) (preflight.Report, error) {
	gone := []preflight.Finding{}
	var eg errgroup.Group
	var mu sync.Mutex
	for _, c := range list {
		eg.Go(func() error {
			err := h.connect(ctx, c)
			if errdefs.IsFailedPrecondition(err) {
				mu.Lock()
				defer mu.Unlock()
				gone = append(gone, preflight.Finding{
					Severity: preflight.Refuse, Member: c.Member, Code: preflight.CodeGone,
					What: "has no running task",
					Cure: fmt.Sprintf("start it, or leave it out of the group (shims are looked up in %s: COHORT_STATE must be what containerd runs with)", h.State),
				})
				return nil
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return preflight.Report{Findings: gone}, err
	}
	facts := []preflight.Member{}
	for _, c := range list {
		if c.inspect == nil {
			continue
		}
		facts = append(facts, preflightFacts(c))
	}
	report, err := preflight.Check(ctx, facts, preflight.Options{})
	if err != nil {
		return report, fmt.Errorf("preflight: %w", err)
	}
	report.Findings = append(gone, report.Findings...)
	for _, f := range report.Findings {
		if f.Severity == preflight.Refuse {
			return report, &RefusedError{Report: report}
		}
	}
	return report, nil
}

var errNotSealed = errors.New("a member's capture is not sealed")
